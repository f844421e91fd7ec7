"""Batch normalisation folded into the convolution before it: a frozen network needs no more."""

from collections import Counter
from collections.abc import Collection

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batchnorm(model: nn.Module, keep: Collection[str] = ()) -> int:
    """Fold every `BatchNorm2d` that follows a `Conv2d` into it, in place; return how many.

    Tracing finds the pairs: a convolution whose output nothing else reads. A model that cannot be
    traced, because its forward pass branches on values, is left as it is.

    Args:
        model: in evaluation mode. Names of layers stay; a folded normalisation becomes `Identity`.
        keep: layers whose output must stay what it is.
    """
    try:
        nodes = list(fx.Tracer().trace(model).nodes)
    except Exception:  # whatever a model's own code may raise on a proxy
        return 0
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    folded = 0
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        names = str(before.target), str(node.target)
        convolution, normalization = (model.get_submodule(name) for name in names)
        if (
            type(convolution) is nn.Conv2d
            and type(normalization) is nn.BatchNorm2d
            and len(before.users) == 1
            and all(calls[name] == 1 for name in names)
            and names[0] not in keep
        ):
            model.set_submodule(names[0], fuse_conv_bn_eval(convolution, normalization))
            model.set_submodule(names[1], nn.Identity())
            folded += 1
    return folded
