"""Teacher checkpoints of various training scripts."""

import argparse
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kd_lightning.errors import InputError
from kd_lightning.storage import checkpoints
from kd_lightning.storage.checkpoints import convert, load_checkpoint, read_checkpoint
from kd_lightning.storage.weights import load_weights, save_weights


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


THEIRS = network(1).state_dict()
RAW = network(2).state_dict()


def prefixed(prefix, state=None):
    return {f"{prefix}{name}": tensor for name, tensor in (state or THEIRS).items()}


def loaded(path, **settings):
    """The weights of a model after loading the file."""
    model = network()
    load_checkpoint(model, path, settings.pop("rename_keys", {"module.": ""}), **settings)
    return model.state_dict()


def assert_theirs(state):
    assert state.keys() == THEIRS.keys()
    for name, tensor in THEIRS.items():
        assert torch.equal(state[name], tensor), name


def refusal(path, **settings):
    with pytest.raises(InputError) as refused:
        loaded(path, **settings)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "content",
    [
        THEIRS,
        {"net": THEIRS, "acc": 93.1, "epoch": 3},
        {"model_state_dict": THEIRS, "optimizer_state_dict": {"state": {}, "param_groups": []}},
        {"state_dict": THEIRS, "hyper_parameters": {"lr": 0.1}},
        {"model": {"name": "a"}, "net": THEIRS},
        {"epoch": 1, "unheard_of": THEIRS},
        {
            "unheard_of": THEIRS,
            "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []},
        },
        {"model": {"state_dict": THEIRS}},
        {"state_dict_ema": THEIRS, "state_dict": RAW},
        {"model": RAW, "model_ema": THEIRS},
        {"model": RAW, "ema": {"module": THEIRS}},
        {"model": RAW, "model_ema": {"n_averaged": torch.tensor(5), **prefixed("module.")}},
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module."),
        prefixed("student."),
        prefixed("backbone."),
        prefixed("model.net.module."),
        {name.replace("0.", "0._orig_mod."): tensor for name, tensor in THEIRS.items()},
        {"state_dict": {**prefixed("model."), "criterion.weight": torch.ones(2)}},
        {"state_dict": {**prefixed("model._orig_mod."), "val_acc.total": torch.tensor(3)}},
        {**prefixed("ema_model.module."), **prefixed("online_model.", RAW)},
        {**THEIRS, "total_ops": torch.zeros(1), "0.total_params": torch.zeros(1)},
        {**THEIRS, "epoch": 3},
        {name: tensor.double() for name, tensor in THEIRS.items()},
        {**THEIRS, "1.num_batches_tracked": torch.tensor([0])},
        {name: tensor for name, tensor in THEIRS.items() if "num_batches" not in name},
    ],
    ids=lambda content: "-".join(map(str, content))[:60],
)
def test_weights_are_found_in_any_wrapper(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    assert_theirs(loaded(tmp_path / "a.pt"))


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "weights"])
def test_format_is_detected_by_content_not_suffix(tmp_path, name):
    save_file(THEIRS, tmp_path / name)
    assert_theirs(loaded(tmp_path / name))
    torch.save({"net": THEIRS}, tmp_path / name)
    assert_theirs(loaded(tmp_path / name))
    torch.save(THEIRS, tmp_path / name, _use_new_zipfile_serialization=False)
    assert_theirs(loaded(tmp_path / name))


def test_half_precision_weights_are_converted(tmp_path):
    torch.save({name: t.half() if t.is_floating_point() else t for name, t in THEIRS.items()},
               tmp_path / "a.pt")  # fmt: skip
    state = loaded(tmp_path / "a.pt")
    assert state["0.weight"].dtype == torch.float32
    assert torch.equal(state["0.weight"], THEIRS["0.weight"].half().float())


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.to(torch.int8),
        lambda weight: weight.to(torch.complex64),
        lambda weight: weight.to_sparse(),
        lambda weight: weight.to("meta"),
    ],
    ids=["int8", "complex", "sparse", "meta"],
)
def test_quantised_sparse_and_complex_weights_are_rejected(tmp_path, change):
    """For example, the integers of a quantised network are not the weights."""
    torch.save({**THEIRS, "0.weight": change(THEIRS["0.weight"])}, tmp_path / "a.pt")
    assert "'0.weight' is a" in refusal(tmp_path / "a.pt")


def test_keys_are_renamed_in_order(tmp_path):
    state = {"m.first.weight": THEIRS["3.weight"]}
    renamed = checkpoints.rename(state, {"m.": "", "first.": "3."})
    assert list(renamed) == ["3.weight"]


def test_extra_keys_are_ignored_by_pattern(tmp_path):
    torch.save({**THEIRS, "aux.0.weight": torch.ones(2), "aux.bias": torch.ones(2)},
               tmp_path / "a.pt")  # fmt: skip
    assert "teacher.ignore_keys=[aux.0.*]" in refusal(tmp_path / "a.pt")
    assert_theirs(loaded(tmp_path / "a.pt", ignore_keys=["aux.*"]))
    # Keys of the model are ignored only on request.
    assert "it has no '0.bias'" in refusal(tmp_path / "a.pt", ignore_keys=["aux.*", "*.bias"])


def test_checkpoint_key_selects_one_of_several_networks(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"teacher": THEIRS, "student": RAW}, path)
    assert "teacher.checkpoint_key=teacher or student" in refusal(path)
    assert_theirs(loaded(path, key="teacher"))
    assert "teacher, student" in refusal(path, key="generator")
    torch.save({"model": THEIRS, "model_ema": RAW}, path)
    assert_theirs(loaded(path, key="model"))
    torch.save({**prefixed("a."), **prefixed("b.", RAW)}, path)
    assert "teacher.ignore_keys=[b.*]" in refusal(path)
    assert_theirs(loaded(path, ignore_keys=["b.*"]))


def test_mismatch_is_reported_without_the_prefix(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(prefixed("model.", {**THEIRS, "3.weight": torch.zeros(7, 4)}), path)
    assert "'3.weight' has the shape (7, 4) instead of (2, 4)" in refusal(path)
    renamed = {name.replace("3.", "fc."): tensor for name, tensor in THEIRS.items()}
    torch.save(prefixed("model.", renamed), path)
    sentence = refusal(path)
    assert "no '3.weight'" in sentence
    assert "'teacher.rename_keys={fc.: 3.}'" in sentence


class Whole(nn.Module):
    """A pickled module."""

    def __init__(self):
        super().__init__()
        self.net = network(1)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"state_dict": THEIRS, "args": argparse.Namespace(lr=0.1)}, "argparse.Namespace"),
        ({"net": THEIRS, "acc": np.float64(0.9)}, "multiarray.scalar"),
        ({"net": THEIRS, "path": Path("x")}, "pathlib"),
        (Whole(), "Whole"),
        ({"epoch": 1, "model": network(1)}, "Sequential"),
    ],
    ids=["namespace", "numpy", "path", "module", "nested module"],
)
def test_unsafe_checkpoint_is_reported_and_convertible(tmp_path, content, named, capsys):
    path = tmp_path / "it's a.pt"
    torch.save(content, path)
    sentence = refusal(path)
    assert named in sentence
    assert "python -c" in sentence
    assert_theirs(loaded(convert(path)))


def test_keys_must_not_become_equal(tmp_path):
    torch.save({**prefixed("one."), **prefixed("two.", RAW)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="several tensors the same name"):
        loaded(tmp_path / "a.pt", rename_keys={"one.": "", "two.": ""})


def test_a_submodule_called_module_beside_one_of_the_same_name(tmp_path):
    torch.save({**THEIRS, **prefixed("module.")}, tmp_path / "a.pt")
    model = nn.Sequential(*network(1))
    model.add_module("module", network(2))
    load_checkpoint(model, tmp_path / "a.pt", {"module.": ""})
    assert_theirs(model.module.state_dict())


def test_conversion_keeps_the_source(tmp_path):
    torch.save(THEIRS, tmp_path / "a.pt")
    with pytest.raises(InputError, match="another name"):
        convert(tmp_path / "a.pt", tmp_path / "a.pt")
    assert_theirs(loaded(tmp_path / "a.pt"))


def test_printed_conversion_command_works(tmp_path, monkeypatch):
    path = tmp_path / "it's a.pt"
    torch.save({"state_dict": THEIRS, "args": argparse.Namespace(lr=0.1)}, path)
    command = refusal(path).split("extract the weights: ")[1]
    command = command.replace("python", "printf '%s\\0'", 1)  # what the shell makes of it
    shell = subprocess.run(command, shell=True, check=True, capture_output=True, text=True)
    option, program, *arguments = shell.stdout.split("\0")[:-1]
    assert option == "-c"
    monkeypatch.setattr(sys, "argv", [option, *arguments])
    exec(program, {})
    assert_theirs(loaded(path.with_suffix(".safetensors")))


class Bomb:
    def __reduce__(self):
        return (print, ("the checkpoint ran code",))


def test_teacher_checkpoint_cannot_run_code(tmp_path, capsys):
    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pt")
    assert "safely" in refusal(tmp_path / "bomb.pt")
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"no checkpoint", ""),
        (json.dumps({"a": 1}).encode(), ""),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"<html><body>Sign in</body></html>", "web page"),
        (gzip.compress(b"x", mtime=0), "gunzip"),
        (b"\x89HDF\r\n\x1a\n", "Keras"),
        (b"PK\x03\x04 the rest is missing", "incomplete"),
    ],
)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_other_file_types_are_rejected(tmp_path, content, reason, name):
    (tmp_path / name).write_bytes(content)
    sentence = refusal(tmp_path / name)
    assert "not a checkpoint that can be read safely" in sentence
    assert reason in sentence


def test_renamed_backbone_and_head_are_combined(tmp_path):
    path = tmp_path / "a.pt"
    parts = {("head.fc" + n[1:] if n[0] == "3" else f"backbone.{n}"): t for n, t in THEIRS.items()}
    torch.save({"state_dict": parts}, path)
    assert "'teacher.rename_keys={head.fc.: 3.}'" in refusal(path)
    assert_theirs(loaded(path, rename_keys={"head.fc.": "3."}))


def test_model_may_have_a_submodule_called_module(tmp_path):
    class Wrapping(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    first, second = Wrapping(), Wrapping()
    torch.save(first.state_dict(), tmp_path / "a.pt")
    load_checkpoint(second, tmp_path / "a.pt", {"module.": ""})
    assert torch.equal(first.module.weight, second.module.weight)


def test_torchscript_archive_is_reported(tmp_path):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "a.pt"))
    assert "TorchScript" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("cut", [100, 400])
def test_truncated_safetensors_file_is_rejected(tmp_path, cut):
    save_file(THEIRS, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:cut])
    assert "safely" in refusal(tmp_path / "a.safetensors")


def test_tied_weights_are_stored(tmp_path):
    network, other = (nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)) for _ in range(2))
    network[1].weight = network[0].weight
    network.to(memory_format=torch.channels_last)
    save_weights(network, tmp_path / "tied.safetensors")
    load_weights(other, tmp_path / "tied.safetensors")
    for name, value in network.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, msg=name)


def test_missing_checkpoint_file_is_reported(tmp_path):
    assert "is a folder" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "missing.pt")


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, {"state_dict": {"a": "b"}}, 3])
def test_checkpoint_without_tensors_is_rejected(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    assert "contains no state dict" in refusal(tmp_path / "a.pt")


def test_gpu_checkpoint_is_loaded_on_the_cpu(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")

    def load(file, map_location=None, weights_only=None):
        assert (map_location, weights_only) == ("cpu", True)
        return {"a": torch.ones(1)}

    monkeypatch.setattr(torch, "load", load)
    assert set(read_checkpoint(tmp_path / "a.pt")) == {"a"}


def for_classes(number, features=4):
    """Weights of a network for another number of classes."""
    return {**THEIRS, "3.weight": torch.randn(number, features), "3.bias": torch.randn(number)}


@pytest.mark.parametrize("state", [for_classes(7), for_classes(1), for_classes(2)])
def test_classifier_for_other_classes_is_left_as_it_is(tmp_path, state):
    torch.save(state, tmp_path / "a.pt")
    model, own = network(), network().state_dict()
    left = load_checkpoint(model, tmp_path / "a.pt", num_classes=2)
    other = len(state["3.bias"]) != 2
    assert left == (["3.weight", "3.bias"] if other else [])
    for name, value in model.state_dict().items():
        assert torch.equal(value, (own if name in left else state)[name]), name


def test_missing_classifier_is_left_as_it_is(tmp_path):
    body = {name: value for name, value in THEIRS.items() if not name.startswith("3.")}
    torch.save(body, tmp_path / "a.pt")
    assert load_checkpoint(network(), tmp_path / "a.pt", num_classes=2) == ["3.weight", "3.bias"]
    assert "it has no '3.weight'" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"3.weight": torch.ones(7, 5)}, "3.weight"),  # other features
        ({"3.weight": torch.ones(7, 4, 1, 1)}, "3.weight"),
        ({"0.weight": torch.ones(7, 3, 3, 3)}, "0.weight"),  # no classifier
    ],
)
def test_other_differences_are_rejected_with_other_classes(tmp_path, change, name):
    torch.save({**for_classes(7), **change}, tmp_path / "a.pt")
    sentence = refusal(tmp_path / "a.pt", num_classes=2)
    assert f"'{name}' has the shape {tuple(change[name].shape)}" in sentence


def test_normalisation_layer_is_no_classifier(tmp_path):
    """Though it has as many weights as there are classes."""
    torch.save({**THEIRS, "1.weight": torch.ones(7)}, tmp_path / "a.pt")
    assert "'1.weight' has the shape (7,)" in refusal(tmp_path / "a.pt", num_classes=4)


def test_fine_tuning_is_suggested_for_other_classes_only(tmp_path):
    torch.save(for_classes(7), tmp_path / "a.pt")
    assert "teacher.finetune=true" in refusal(tmp_path / "a.pt")
    for state in (for_classes(7, features=5), {**for_classes(7), "more": torch.ones(1)}):
        torch.save(state, tmp_path / "a.pt")
        assert "finetune" not in refusal(tmp_path / "a.pt")


def test_weights_tied_more_than_once_are_stored(tmp_path):
    network, other = (nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))) for _ in range(2))
    for layer in network[1:]:
        layer.weight = network[0].weight
    save_weights(network, tmp_path / "tied.safetensors")
    load_weights(other, tmp_path / "tied.safetensors")
    for name, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_prefix_of_the_backbone_alone_is_removed(tmp_path):
    network, other = (nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)) for _ in range(2))
    state = {
        name if name[0] == "1" else f"body.{name}": t for name, t in network.state_dict().items()
    }
    torch.save(state, tmp_path / "a.pt")
    load_checkpoint(other, tmp_path / "a.pt")
    assert torch.equal(other[0].weight, network[0].weight)
    assert torch.equal(other[1].weight, network[1].weight)
