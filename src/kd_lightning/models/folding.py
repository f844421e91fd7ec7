"""Batch normalisation folded into the convolution before it: a frozen network needs no more."""

from collections import Counter
from collections.abc import Collection, Iterator

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kd_lightning.models.trial import Onlooker, stand_in


def fold_batchnorm(model: nn.Module, keep: Collection[str] = ()) -> int:
    """Fold every `BatchNorm2d` that follows a `Conv2d` into it, in place; return how many.

    Tracing finds the pairs, and only those are folded where nothing else can see the difference:
    plain modules that are called once, whose weights belong to them alone. A model that cannot be
    traced, because its forward pass branches on values, or that has hooks is left as it is.

    Args:
        model: in evaluation mode. Names of layers stay; a folded normalisation becomes `Identity`.
        keep: layers whose output must stay what it is.
    """
    if any(has_hooks(module) for module in model.modules()):
        return 0
    try:
        # A copy: what the forward pass stores in attributes must not be a proxy of the tracer's.
        nodes = list(fx.Tracer().trace(stand_in(model)).nodes)
    except Exception:  # whatever a model's own code may raise on a proxy
        return 0
    folded = 0
    for first, second in list(_pairs(model, nodes, keep)):
        convolution, normalization = model.get_submodule(first), model.get_submodule(second)
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(normalization, nn.BatchNorm2d)
        try:
            fused = fuse_conv_bn_eval(convolution, normalization)
        except Exception:  # unusual weights
            continue
        model.set_submodule(first, fused)
        model.set_submodule(second, nn.Identity())
        folded += 1
    return folded


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook is attached that may change something, as those of pruning do."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not isinstance(hook, Onlooker) for hook in hooks)


def _pairs(
    model: nn.Module, nodes: list[fx.Node], keep: Collection[str]
) -> Iterator[tuple[str, str]]:
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    read = [str(node.target) for node in nodes if node.op == "get_attr"]

    def alone(name: str, module: nn.Module) -> bool:
        """Whether nothing but one call of it sees the module and its weights."""
        return (
            calls[name] == 1
            and names[id(module)] == 1
            and all(owners[id(weight)] == 1 for weight in module.parameters())
            and not any(target.startswith(f"{name}.") for target in read)
        )

    for node in nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        first, second = str(before.target), str(node.target)
        convolution, normalization = model.get_submodule(first), model.get_submodule(second)
        if (
            type(convolution) is nn.Conv2d
            and type(normalization) is nn.BatchNorm2d
            and normalization.running_mean is not None
            and not normalization.training
            and len(before.users) == 1
            and alone(first, convolution)
            and alone(second, normalization)
            and not any(_ends(container, first, second) for container in keep)
        ):
            yield first, second


def _ends(container: str, convolution: str, normalization: str) -> bool:
    """Whether a layer ends between the two: it is the convolution, or holds only that one."""
    return f"{convolution}.".startswith(f"{container}.") and not normalization.startswith(
        f"{container}."
    )
