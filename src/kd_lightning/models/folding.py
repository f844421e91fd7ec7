"""Folding of BatchNorm into the preceding convolution, for frozen networks."""

from collections import Counter
from collections.abc import Collection, Iterator

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kd_lightning.models.trial import Onlooker, stand_in


def fold_batchnorm(model: nn.Module, keep: Collection[str] = ()) -> int:
    """Fold every `BatchNorm2d` that follows a `Conv2d` into it, in place; return how many.

    Pairs are found by tracing. Only those without side effects are folded: plain modules that are
    called once and do not share weights. A model that cannot be traced (because its forward pass
    branches on values) or that has hooks is left unchanged.

    Args:
        model: in evaluation mode. Layer names are kept; a folded BatchNorm becomes `Identity`.
        keep: layers whose output must not change.
    """
    if any(has_hooks(module) for module in model.modules()):
        return 0
    try:
        # On a copy, as the forward pass may store proxies of the tracer in attributes.
        nodes = list(fx.Tracer().trace(stand_in(model)).nodes)
    except Exception:  # the model's code may raise anything on a proxy
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
    """Whether the module has hooks that may change something, such as those of pruning."""
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
        """Whether the module is called once, and its weights are not used elsewhere."""
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
    """Whether the container's output is the convolution's: folding would change it."""
    return f"{convolution}.".startswith(f"{container}.") and not normalization.startswith(
        f"{container}."
    )
