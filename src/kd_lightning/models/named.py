"""Models of timm and torchvision by name, and their pretrained weights.

The builders never download anything: their networks are initialised randomly. Pretrained weights
are loaded once, at the start of a training (`pretrained_state`), so that a run's student or a
stored teacher is rebuilt from its file alone.
"""

import contextlib
import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torchvision
from torch import Tensor, nn

from kd_lightning.errors import InputError

models: Any = torchvision.models  # its public functions are not all exported for type checkers

_OF_THE_SECTION = {
    "pretrained": "pretrained: true in the section student or teacher",
    "checkpoint_path": "checkpoint in the section student or teacher",
    "cache_dir": "the environment variable HF_HUB_CACHE",
}
"""Arguments of `timm.create_model` that are not accepted, and what to use instead."""


class Pretrained(NamedTuple):
    """What the pretrained weights of a model were trained for.

    Attributes:
        name: name of the model.
        num_classes: number of classes; 0: without classifier.
        image_size: height and width of the images, in pixels.
        mean, std: normalisation of pixel values in [0, 1].
    """

    name: str
    num_classes: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def timm_model(
    model_name: str,
    num_classes: int = 1000,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """A model of timm, randomly initialised.

    Args:
        model_name: name in ``timm.list_models()``, optionally with the tag of its weights, as
            ``resnet18.a1_in1k``.
        num_classes: number of classes.
        pretrained_cfg_overlay: changes of the configuration of the pretrained weights, e.g. a local
            ``file``.
        options: other arguments of ``timm.create_model``, e.g. ``img_size`` or ``drop_path_rate``.

    Raises:
        InputError: timm is not installed.
        ValueError: timm has no such model, or an option belongs elsewhere.
    """
    timm = _timm()
    _check_name(timm, model_name, options)
    return timm.create_model(
        model_name,
        num_classes=num_classes,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        **options,
    )


def torchvision_model(
    model_name: str, num_classes: int = 1000, weights: str = "DEFAULT", **options: Any
) -> nn.Module:
    """A classifier of torchvision, randomly initialised.

    Args:
        model_name: name in ``torchvision.models.list_models(torchvision.models)``.
        num_classes: number of classes.
        weights: name of the pretrained weights, as ``IMAGENET1K_V1``, for ``pretrained: true``.
        options: other arguments of the model, e.g. ``dropout``.

    Raises:
        ValueError: torchvision has no such model.
    """
    names = models.list_models(models)
    if model_name.lower() not in names:
        raise ValueError(_no_such_model("torchvision", model_name, names))
    return models.get_model(model_name, weights=None, num_classes=num_classes, **options)


def pretrained_settings(builder: Callable[..., Any], arguments: Mapping[str, Any]) -> Pretrained:
    """What the pretrained weights of a model were trained for; without a download.

    Args:
        builder: `timm_model` or `torchvision_model`.
        arguments: its arguments.

    Raises:
        InputError: timm is not installed.
        ValueError: the model has no pretrained weights.
    """
    if builder is timm_model:
        return _timm_settings(**arguments)
    if builder is torchvision_model:
        return _torchvision_settings(**arguments)
    raise ValueError(
        "only models by name have pretrained weights: select timm or torchvision, or give a "
        "checkpoint"
    )


def pretrained_state(
    builder: Callable[..., Any], arguments: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The pretrained weights of a model, with their own classifier; downloaded if necessary.

    Args:
        builder: `timm_model` or `torchvision_model`.
        arguments: its arguments.

    Raises:
        ValueError: the weights need another option of the model.
        Exception: whatever the library raises if they cannot be downloaded.
    """
    settings = pretrained_settings(builder, arguments)
    options = {key: value for key, value in arguments.items() if key != "num_classes"}
    if builder is timm_model:
        with _no_pickled_code():
            network = _timm().create_model(
                **options, num_classes=settings.num_classes, pretrained=True
            )
    else:
        chosen = _torchvision_weights(**arguments)
        options = {key: value for key, value in options.items() if key != "weights"}
        name = options.pop("model_name")
        with _no_pickled_code():
            network = models.get_model(name, weights=chosen, progress=False, **options)
        # GoogLeNet and Inception v3 normalise their input themselves.
        if getattr(network, "transform_input", False) != options.get("transform_input", False):
            raise ValueError(f"the weights of {name} need the model's option transform_input: true")
    return network.state_dict()


@contextlib.contextmanager
def _no_pickled_code() -> Iterator[None]:
    """Let `torch.load` read tensors only, whatever its caller says: files in the cache of
    downloaded weights are not compared with their hashes.
    """
    keys = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {key: os.environ.pop(key) for key in keys if key in os.environ}
    os.environ[keys[0]] = "1"
    try:
        yield
    finally:
        os.environ.pop(keys[0], None)
        os.environ.update(before)


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise InputError(
            "models by name need timm; install it with: pip install -e '.[timm]'"
        ) from error
    return timm


def _check_name(timm: ModuleType, model_name: str, options: Mapping[str, Any]) -> None:
    for key, instead in _OF_THE_SECTION.items():
        if key in options:
            raise ValueError(f"omit {key}; use {instead}")
    if ":" in model_name:
        raise ValueError(
            f"model_name={model_name} is not a name in timm.list_models(); give the name of the "
            "architecture, and its weights by pretrained_cfg_overlay={hf_hub_id: ..., "
            "num_classes: ...}, or as a checkpoint"
        )
    if not timm.is_model(model_name):
        raise ValueError(_no_such_model("timm", model_name, timm.list_models()))


def _timm_settings(
    model_name: str,
    num_classes: int = 1000,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    **options: Any,
) -> Pretrained:
    timm = _timm()
    _check_name(timm, model_name, options)
    found = timm.get_pretrained_cfg(model_name)
    if found is None:
        raise ValueError(f"timm has no configuration of {model_name}")
    settings = {**found.to_dict(), **(pretrained_cfg_overlay or {})}
    sources = ("url", "file", "hf_hub_id", "state_dict")
    if not any(settings.get(source) for source in sources):
        raise ValueError(f"timm has no pretrained weights of {model_name}")
    data = timm.data.resolve_data_config(pretrained_cfg=settings)
    return Pretrained(
        name=model_name,
        num_classes=settings["num_classes"],
        image_size=data["input_size"][1],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def _torchvision_settings(model_name: str, **arguments: Any) -> Pretrained:
    weights = _torchvision_weights(model_name, **arguments)
    preset = weights.transforms()
    return Pretrained(
        name=model_name,
        num_classes=len(weights.meta["categories"]),
        image_size=preset.crop_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _torchvision_weights(model_name: str, weights: str = "DEFAULT", **_: Any) -> Any:
    names = models.list_models(models)
    if model_name.lower() not in names:
        raise ValueError(_no_such_model("torchvision", model_name, names))
    known = models.get_model_weights(model_name).__members__
    if weights not in known:
        choices = ", ".join(known) or "none"
        raise ValueError(f"torchvision has no weights {weights} of {model_name}, but {choices}")
    return known[weights]


def _no_such_model(library: str, name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{library} has no model {name}{hint}"
