"""Loading of the weights that a network starts from: a checkpoint, or pretrained ones by name."""

import logging

from torch import nn

from kd_lightning.config.nodes import Node, find_target, without
from kd_lightning.config.plan import CheckpointPlan, PretrainedPlan
from kd_lightning.errors import InputError
from kd_lightning.models.named import pretrained_state
from kd_lightning.storage.checkpoints import State, fit_state, load_checkpoint
from kd_lightning.storage.weights import weights_sha256

log = logging.getLogger(__name__)


def load_initial(
    model: nn.Module,
    node: Node,
    weights: CheckpointPlan | PretrainedPlan,
    num_classes: int | None = None,
) -> str:
    """Load the weights that a network starts from.

    Args:
        model: the network.
        node: its `_target_` node.
        weights: which weights.
        num_classes: number of classes, if the network is going to be trained: a classifier for
            another number is left as it is.

    Returns:
        SHA-256 of the loaded weights, in hex.

    Raises:
        InputError: the weights cannot be read or downloaded, or do not match the network.
    """
    if isinstance(weights, CheckpointPlan):
        left = load_checkpoint(
            model,
            weights.path,
            weights.rename_keys,
            weights.ignore_keys,
            weights.key,
            weights.role,
            num_classes,
        )
    else:
        left = fit_state(model, _pretrained(node, weights.role), weights.origin, num_classes)
    if left:
        log.info("%s: another classifier is trained (%s)", weights.origin, ", ".join(left))
    return weights_sha256(model, without=left)


def _pretrained(node: Node, role: str) -> State:
    builder = find_target(node["_target_"], f"{role}.model")
    try:
        return pretrained_state(builder, without(node, "_target_"))
    except InputError:
        raise
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{role}.pretrained: {error}") from error
    except Exception as error:  # each library has network errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{role}.pretrained: the weights of {node['model_name']} could not be downloaded "
            f"({reason}); download them elsewhere, and use {role}.checkpoint=FILE"
        ) from error
