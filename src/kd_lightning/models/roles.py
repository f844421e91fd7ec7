"""The roles of layers: stages, embedding and classifier, found in any model."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from kd_lightning.models.shapes import LayerShapes, Shapes
from kd_lightning.models.trial import INPUT


class Roles(NamedTuple):
    """The layers that distillation methods speak of.

    A model may declare them by an attribute `roles`; otherwise they are found by `find_roles`.

    Attributes:
        stages: layers whose outputs are feature maps, from input to output.
        embedding: the features before the classifier.
        classifier: the layer that outputs the logits.
        pooled: layer whose output is pooled to the embedding, if that is not the last stage.
    """

    stages: tuple[str, ...]
    embedding: str
    classifier: str
    pooled: str = ""


NAMES = ("stages", "last_stage", "pooled", "embedding", "classifier")
"""What `select` accepts in place of a layer name."""


def find_roles(shapes: LayerShapes, num_classes: int) -> Roles:
    """The roles that the model declares, by an attribute `roles` or as those of timm; else the last
    whole feature map of every resolution, and the last linear layer or convolution with one output
    per class, with its input.

    Args:
        shapes: layers of the model.
        num_classes: number of classes.

    Raises:
        ValueError: the model declares none and has no such layers.
    """
    declared = getattr(shapes.model, "roles", None)
    if isinstance(declared, Roles):
        return declared
    if (of_timm := _roles_of_timm(shapes)) is not None:
        return of_timm
    modules = dict(shapes.model.named_modules(remove_duplicate=False))
    classifier = ""
    for name in shapes:  # in order of execution
        layer = modules.get(name)
        outputs = (
            layer.out_features if isinstance(layer, nn.Linear)
            else layer.out_channels if isinstance(layer, nn.modules.conv._ConvNd)
            else None
        )  # fmt: skip
        if outputs == num_classes:
            classifier = name
    if not classifier:
        raise ValueError(
            f"no linear layer or convolution with {num_classes} outputs was found; name the layers"
        )
    stages: dict[tuple[int, int], str] = {}
    for name in shapes:
        layout = shapes.layouts.get(name)
        if name in ("", classifier) or layout is None or layout.size == (1, 1):
            continue
        # A whole stage rather than a layer inside the next one, before its pooling.
        if name.count(".") <= stages.get(layout.size, name).count("."):
            stages.pop(layout.size, None)  # a later layer moves to the end
            stages[layout.size] = name
    return Roles(tuple(stages.values()), classifier + INPUT, classifier)


def _roles_of_timm(shapes: LayerShapes) -> Roles | None:
    """The roles that a model of timm declares: `feature_info` and the classifier in its
    configuration. Of several stages with the same resolution the last. None if it is no such model.
    """
    declared = getattr(shapes.model, "feature_info", None)
    settings = getattr(shapes.model, "pretrained_cfg", None)
    if not declared or not isinstance(settings, Mapping):
        return None
    named = settings.get("classifier")
    # A distilled transformer averages the logits of two classifiers.
    classifier = named[0] if isinstance(named, tuple | list) and named else named
    if not isinstance(classifier, str) or f"{classifier}{INPUT}" not in shapes.inputs:
        return None
    stages: dict[tuple[int, int], str] = {}
    for stage in declared:
        layout = shapes.layouts.get(stage["module"])
        if layout is not None and layout.size != (1, 1):
            stages.pop(layout.size, None)
            stages[layout.size] = stage["module"]
    return Roles(tuple(stages.values()), f"{classifier}{INPUT}", classifier)


def select(names: str | Sequence[str], shapes: Shapes, num_classes: int) -> tuple[str, ...]:
    """Layers by role (`NAMES`) or by name; roles have precedence.

    Args:
        names: one or several.
        shapes: layers of the model.
        num_classes: number of classes.

    Raises:
        ValueError: a role cannot be found.
    """
    selected: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        if name not in NAMES or not isinstance(shapes, LayerShapes):
            selected.append(name)
            continue
        roles = find_roles(shapes, num_classes)
        if name == "pooled" and roles.pooled:
            selected.append(roles.pooled)
        elif name in ("stages", "last_stage", "pooled"):
            if not roles.stages:
                raise ValueError("no layer outputs a feature map; name the layers")
            selected += roles.stages if name == "stages" else roles.stages[-1:]
        else:
            selected.append(roles.embedding if name == "embedding" else roles.classifier)
    return tuple(selected)
