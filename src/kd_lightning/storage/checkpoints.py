"""Loading of third-party checkpoints: find the state dict in a file and match it to a model.

Files are read without executing code from them. The state dict may be nested as in common training
scripts, and its keys may have the prefixes of wrappers.
"""

import difflib
import logging
import pickle
import re
import shlex
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.files import replacing

log = logging.getLogger(__name__)

State = dict[str, Tensor]

NESTS = (
    # Averaged weights come before raw ones, as they are what such trainings report.
    "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "model_ema_state_dict", "ema",
    "params_ema", "state_dict", "model_state_dict", "model_state", "model", "net", "network",
    "net_state_dict", "weights", "params",
)  # fmt: skip
"""Common keys of the state dict, in order of precedence."""

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Parts that wrappers insert into keys, at any position: torch.compile, FSDP, activation
checkpointing."""

CLASSIFIERS = nn.Linear, nn.Conv2d

COUNTERS = ("*total_ops", "*total_params", "n_averaged")
"""Counters that are not weights: of profilers (thop) in every module, of `AveragedModel`."""


def load_checkpoint(
    model: nn.Module,
    path: Path,
    rename_keys: Mapping[str, str] | None = None,
    ignore_keys: Sequence[str] = (),
    key: str | None = None,
    role: str = "teacher",
    num_classes: int | None = None,
) -> list[str]:
    """Load a checkpoint file into a model, which it must match exactly.

    If the keys do not match, a prefix under which all keys of the model are found is removed, and
    keys without it are skipped.

    Args:
        model: its weights are replaced.
        path: the file.
        rename_keys: key prefixes to their replacements, applied in order.
        ignore_keys: patterns (`fnmatch`) of keys to skip.
        key: dotted path of the state dict in the file; None: found by `NESTS`.
        role: ``teacher`` or ``student``, for messages.
        num_classes: number of classes, if a classifier for another number may be left as it is
            in the model, to be trained.

    Returns:
        Names of the weights and buffers that were left as they are.

    Raises:
        InputError: the file cannot be read safely, or does not match; names the first difference.
    """
    origin = f"{role}.checkpoint={path}"
    own, state = model.state_dict(), read_checkpoint(path, key, role)
    renamed = rename(state, rename_keys or {})
    fits, unique = own.keys() <= state.keys(), len(renamed) == len(state)
    if not (fits or unique):
        raise InputError(f"{origin}: {role}.rename_keys gives several tensors the same name")
    # The model itself may have a submodule called `module`.
    if not fits or (unique and own.keys() <= renamed.keys()):
        state = renamed
    for name in list(state):
        patterns = ignore_keys if name in own else (*ignore_keys, *COUNTERS)
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            del state[name]
    state = _without_prefix(state, own, origin, role)
    try:
        return fit_state(model, state, origin, num_classes)
    except InputError as error:
        advice = _advice(state, own, role)
        if num_classes is None and _differ_in_outputs(state, own):
            advice = f"; for other classes, {role}.finetune=true trains another classifier"
        raise InputError(f"{error}{advice}") from error


def read_checkpoint(path: Path, key: str | None = None, role: str = "teacher") -> State:
    """Read the state dict from a checkpoint file, in safetensors or torch format by content.

    The torch format is read with ``weights_only=True``, so that the file cannot run code.

    Args:
        path: the file.
        key: see `load_checkpoint`.
        role: see `load_checkpoint`.

    Raises:
        InputError: the file is missing or not such a checkpoint.
    """
    origin = f"{role}.checkpoint={path}"
    if path.is_dir():
        raise InputError(f"{origin} is a folder, not a file")
    if not path.is_file():
        raise InputError(f"{origin} does not exist")
    return find_state(_read(path, origin), origin, key, role)


def _read(path: Path, origin: str) -> Any:
    unreadable = (
        f"{origin} is not a checkpoint that can be read safely "
        "(safetensors, or torch.save of a state dict)"
    )
    head = b""
    try:
        with path.open("rb") as file:
            head = file.read(64)
            if reason := _what_else(head):
                raise InputError(f"{unreadable}: {reason}")
            if head[8:9] == b"{":  # safetensors: a JSON header after its length
                return load_file(path)
            file.seek(0)
            # Pass the file, not the path, whose suffix would determine the format.
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+\.\w+)", str(error))
        if refused is None:
            raise InputError(unreadable) from error
        program = f"from kd_lightning.storage.checkpoints import convert; convert({str(path)!r})"
        raise InputError(
            f"{unreadable}: loading it would run the code of {refused[1]}; if you trust "
            f"its source, extract the weights: python -c {shlex.quote(program)}"
        ) from error
    except InputError:
        raise
    except Exception as error:  # torch may raise anything
        reason = ": it is an incomplete or a different archive" if head[:2] == b"PK" else ""
        if "torchscript" in str(error).lower():
            reason = ": it is a TorchScript archive; save the state_dict() of torch.jit.load"
        raise InputError(f"{unreadable}{reason}") from error


def _what_else(head: bytes) -> str:
    """The kind of a file that is not a checkpoint, by its first bytes; empty if unknown."""
    text = head.lstrip().lower()
    if not head:
        return "it is empty"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file with: git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page; download the file itself"
    if head.startswith(b"\x89HDF"):
        return "it is an HDF5 file, as written by Keras"
    if head.startswith(b"\x1f\x8b"):
        return "it is compressed; decompress it with gunzip"
    return ""


def find_state(content: Any, origin: str, key: str | None = None, role: str = "teacher") -> State:
    """Find the state dict of a network in the content of a checkpoint file.

    Raises:
        InputError: there is none, or there are several and no `key` is given.
    """
    if key is not None:
        for part in key.split("."):
            if not isinstance(content, dict) or part not in content:
                there = ", ".join(map(str, content)) if isinstance(content, dict) else "no keys"
                raise InputError(f"{role}.checkpoint_key={key}: {origin} has {there[:200]}")
            content = content[part]
    else:
        while isinstance(content, dict):
            nests = [name for name, value in content.items() if isinstance(value, dict)]
            states = [name for name in nests if _holds_state(content[name])]
            known = [name for name in NESTS if name in states]
            if not known and len(states) > 1 and not _is_state(content):
                raise InputError(
                    f"{origin} contains several state dicts; select one with "
                    f"{role}.checkpoint_key={' or '.join(states)}"
                )
            chosen = (known or (states if not _is_state(content) else []))[:1]
            if not chosen:
                break
            if len(states) > 1:
                log.info("%s: weights taken from '%s'", origin, chosen[0])
            content = content[chosen[0]]
    state: State = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(name, str) and isinstance(value, Tensor):
            state[name] = value
    if not state:
        raise InputError(f"{origin} contains no state dict (names to tensors)")
    return state


def _is_state(value: Any) -> bool:
    """Whether it maps names to tensors, possibly with a few other entries."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return False
    tensors = sum(isinstance(part, Tensor) for part in value.values())
    return 2 * tensors > len(value)


def _holds_state(value: Any) -> bool:
    if not isinstance(value, dict) or "param_groups" in value:  # not a dict, or an optimizer state
        return False
    return _is_state(value) or any(_holds_state(part) for part in value.values())


def rename(state: Mapping[str, Tensor], rename_keys: Mapping[str, str]) -> State:
    """Replace key prefixes, one after the other."""
    renamed = {}
    for key, tensor in state.items():
        for old, new in rename_keys.items():
            if key.startswith(old):
                key = new + key[len(old) :]
        renamed[key] = tensor
    return renamed


def _without_prefix(state: State, own: Mapping[str, Tensor], origin: str, role: str) -> State:
    """Extract the part of a state dict that matches the network, without its prefix."""
    if not any(part in name for name in own for part in WRAPPERS):
        for part in WRAPPERS:
            state = {name.replace(part, ""): tensor for name, tensor in state.items()}
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    if not needed or all(name in state for name in needed):
        return state
    ends = [name for name in needed if any(key.endswith(f".{name}") for key in state)]
    if not ends:
        return state
    found = {key[: -len(ends[0])] for key in state if key.endswith(f".{ends[0]}")}
    hits = {prefix: sum(prefix + name in state for name in needed) for prefix in found}
    whole = [
        prefix
        for prefix in sorted(found, key=lambda prefix: ("ema" not in prefix, len(prefix), prefix))
        if hits[prefix] == len(needed)
        and all(state[prefix + name].numel() == own[name].numel() for name in needed)
    ]
    if len(whole) > 1 and "ema" not in whole[0]:
        raise InputError(
            f"{origin} contains several matching networks, {' and '.join(whole)}; skip the "
            f"others with {role}.ignore_keys=[{','.join(f'{name}*' for name in whole[1:])}]"
        )
    # If none is complete, use the best match; the missing keys are renamed or reported later.
    prefix = whole[0] if whole else max(sorted(found), key=lambda prefix: hits[prefix])
    if 2 * hits[prefix] < len(needed):
        return state
    log.info("%s: using the keys that begin with '%s'", origin, prefix)
    others = {} if whole else {n: part for n, part in state.items() if not n.startswith(prefix)}
    return others | {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def _advice(state: State, own: Mapping[str, Tensor], role: str) -> str:
    """Suggest how to rename or skip the first unmatched key."""
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    if not extra:
        return ""
    if not missing:
        first = extra[0].rsplit(".", 1)
        pattern = f"{first[0]}.*" if len(first) == 2 else first[0]
        return f"; to skip it: {role}.ignore_keys=[{pattern}]"
    alike = [name for name in extra if state[name].shape == own[missing[0]].shape]
    near = difflib.get_close_matches(missing[0], alike, n=1, cutoff=0.3)
    if not near:
        return ""
    theirs, ours = near[0].split("."), missing[0].split(".")
    while len(theirs) > 1 and len(ours) > 1 and theirs[-1] == ours[-1]:
        theirs, ours = theirs[:-1], ours[:-1]
    dot = "." if len(theirs) <= near[0].count(".") else ""
    pair = f"{'.'.join(theirs)}{dot}: {'.'.join(ours)}{dot}"
    return f"; if '{near[0]}' corresponds to it: '{role}.rename_keys={{{pair}}}'"


def _differ_in_outputs(state: State, own: Mapping[str, Tensor]) -> bool:
    """Whether the only differences are in the number of outputs of layers."""
    return own.keys() == state.keys() and all(
        own[name].shape[1:] == state[name].shape[1:] for name in own if own[name].ndim
    )


def fit_state(
    model: nn.Module, state: Mapping[str, Tensor], origin: str, num_classes: int | None = None
) -> list[str]:
    """Load a state dict that must match the model exactly.

    Args:
        model: its weights are replaced.
        state: names to tensors.
        origin: its name in messages.
        num_classes: see `load_checkpoint`, also for the returned names.

    Raises:
        InputError: it does not; names the first difference.
    """
    own, state = model.state_dict(), dict(state)
    left = [] if num_classes is None else _other_classifier(model, state, num_classes)
    state |= {name: own[name] for name in left}
    other = f"{origin} does not match the architecture {type(model).__name__}: "
    for key in own:
        if key.endswith("num_batches_tracked"):
            # Missing before torch 0.4.1, and without effect on the outputs.
            state.setdefault(key, own[key])
        if key not in state:
            has = next(iter(state), "nothing")
            raise InputError(f"{other}it has no '{key}', but '{has}' etc.")
        if own[key].numel() == state[key].numel() == 1:
            state[key] = state[key].reshape(own[key].shape)  # a scalar, or a list of one
        if own[key].shape != state[key].shape:
            raise InputError(
                f"{other}'{key}' has the shape {tuple(state[key].shape)} instead of "
                f"{tuple(own[key].shape)}"
            )
        if own[key].is_floating_point() and not _is_plain(state[key]):
            raise InputError(
                f"{origin}: '{key}' is a {_kind(state[key])} tensor; convert it to a plain "
                "floating-point tensor"
            )
    if extra := [key for key in state if key not in own]:
        raise InputError(f"{other}unexpected key '{extra[0]}'")
    model.load_state_dict(state)
    return left


def _other_classifier(model: nn.Module, state: State, num_classes: int) -> list[str]:
    """Weights and biases of the layers with one output per class that have another number of
    outputs in the state dict, or do not occur in it.
    """
    found = []
    for name, own in model.named_parameters():
        other = state.get(name)
        layer = model.get_submodule(name.rpartition(".")[0])
        if own.shape[:1] != (num_classes,) or not isinstance(layer, CLASSIFIERS):
            continue
        if other is None or (
            other.shape != own.shape and other.ndim == own.ndim and other.shape[1:] == own.shape[1:]
        ):
            found.append(name)
    return found


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is a dense floating-point tensor, not quantised."""
    plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    return plain and (tensor.is_floating_point() or tensor.numel() == 1)


def _kind(tensor: Tensor) -> str:
    words = (tensor.dtype, *([tensor.layout] if tensor.layout != torch.strided else []))
    return ("meta " if tensor.is_meta else "") + " ".join(
        str(word).removeprefix("torch.") for word in words
    )


def convert(source: str | Path, target: str | Path | None = None) -> Path:
    """Convert a checkpoint that contains arbitrary objects to a safetensors file.

    Only for trusted files: loading such a file can run arbitrary code.

    Args:
        source: file in torch format; models in it are converted to their state dict.
        target: output file; by default next to the source, with the suffix ``.safetensors``.
    """
    target = Path(target or Path(source).with_suffix(".safetensors"))

    def plain(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return value.state_dict()
        if isinstance(value, Mapping):
            return {key: plain(part) for key, part in value.items()}
        return value

    if target.resolve() == Path(source).resolve():
        raise InputError(f"{source}: the converted file needs another name")
    content = plain(torch.load(source, map_location="cpu", weights_only=False))
    state = find_state(content, str(source))
    state = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    with replacing(target) as partial:
        save_file(state, partial)
    print(f"{len(state)} tensors written to {target}")
    return target
