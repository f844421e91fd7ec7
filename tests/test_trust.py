"""What files of others may name: networks, data sets, terms, optimizers and schedulers only."""

import json
import re
import subprocess  # noqa: F401 (named by test_user_packages_can_be_trusted)
import sys
from pathlib import Path

import pytest
import torchvision  # noqa: F401 (as well)
import yaml
from test_runs import CONFIG, MODEL, model

from kd_lightning.config import stored
from kd_lightning.config.tree import tree
from kd_lightning.config.trust import TRUSTED, check_trusted
from kd_lightning.errors import InputError
from kd_lightning.models import ConvNet


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "torch.hub.load", "subprocess.Popen", "torch.load",
     "kd_lightning.data.folder.os.system",
     "torchvision.models.squeezenet.torch.load", "kd_lightning.data.views.PLAIN"],
)  # fmt: skip
@pytest.mark.parametrize("nest", [lambda n: n, lambda n: {"a": [(1, {"b": n})]}, lambda n: [n]])
def test_untrusted_targets_are_rejected_at_any_depth(target, nest):
    node = {"_target_": "torch.nn.Identity", "inner": nest({"_target_": target, "x": 1})}
    with pytest.raises(InputError, match=r"student\.model") as refused:
        check_trusted(node, "student.model")
    sentence = str(refused.value)
    assert sentence.startswith(f"student.model._target_={target} is not in {', '.join(TRUSTED)}")
    assert "--trust" in sentence


@pytest.mark.parametrize(
    "value",
    ["${oc.env:HOME}", "a ${b}", ["x", {"y": "${oc.create:{_target_: torch.load, f: evil.pt}}"}]],
)
def test_interpolations_are_rejected(value):
    """Resolved, one could become a target of its own, or a secret of this machine."""
    node = {"_target_": "kd_lightning.models.ConvNet", "channels": value}
    with pytest.raises(InputError, match=r"student\.model contains the interpolation"):
        check_trusted(node, "student.model", ("mine",))


@pytest.mark.parametrize(
    "target",
    ["torchvision.models.resnet.WeightsEnum.get_state_dict", "torch.nn.Linear.load_state_dict",
     "torchvision.models._api.get_model", "torch.nn.modules._functions.BackwardHookFunction"],
)  # fmt: skip
def test_private_functions_and_methods_are_rejected(target):
    with pytest.raises(InputError, match="rejected"):
        check_trusted({"_target_": target}, "student.model")


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "torch.nn.attention.activate_flash_attention_impl", "impl": "FA3"},
        {"_target_": "torchvision.models.feature_extraction.create_feature_extractor"},
        {"_target_": "torchvision.models.detection.fasterrcnn_resnet50_fpn"},
        {"_target_": "torchvision.models.get_model", "name": "resnet18"},
        {"_target_": "torchvision.models.resnet18", "weights": "DEFAULT"},
        {"_target_": "torchvision.models.resnet18", "pretrained": True},
        {"_target_": "torchvision.models.resnet18", "_args_": ["DEFAULT"]},
        {"_target_": "kd_lightning.data.decoded_rows.DecodedRows", "path": "x"},
        {"_target_": "torch.nn.cpp.ModuleWrapper"},
        {"_target_": "kd_lightning.models.named.pretrained_state"},
        {"_target_": "kd_lightning.data.decoding.decode", "file": "x"},
    ],
)
def test_functions_that_are_no_networks_are_rejected(node):
    """Some load pickled files, import modules, or call what they are given."""
    with pytest.raises(InputError, match="rejected"):
        check_trusted({"_target_": "torch.nn.Sequential", "_args_": [node]}, "student.model")


@pytest.mark.parametrize("section", ["student", "teacher", "data", "optimizer", "scheduler"])
def test_shipped_choices_are_trusted(section):
    checked = 0
    for path in Path(tree(), section).glob("*.yaml"):
        node = yaml.safe_load(path.read_text())
        found = json.loads(re.sub(r"\$\{[^\"]*", "x", json.dumps(node)))
        check_trusted(found, section)
        checked += "_target_" in json.dumps(found)
    assert checked


def test_values_that_no_run_writes_are_rejected(run):
    for text in ("!!set {a: null}", "!!binary aGk=", "2020-01-01"):
        node = {"_target_": "torch.nn.Identity", "x": stored.parse_yaml(text)}
        with pytest.raises(InputError, match="which no run writes"):
            check_trusted(node, "student.model")
    pairs = stored.parse_yaml("!!pairs [a: {_target_: os.mkdir, path: x}]")
    with pytest.raises(InputError, match="rejected"):
        check_trusted({"_target_": "torch.nn.Sequential", "_args_": pairs}, "student.model")


def test_untrusted_modules_are_not_imported():
    sys.modules.pop("this", None)
    with pytest.raises(InputError, match="rejected"):
        check_trusted({"_target_": "this.s"}, "student.model")
    assert "this" not in sys.modules


def test_user_packages_can_be_trusted(run):
    run.write_config({**CONFIG, "student": {"model": {"_target_": "test_trust.own"}}})
    run.save_weights(model())
    for trust in ((), ("test",), ("elsewhere", "kd_lightning.files")):
        with pytest.raises(InputError, match="--trust"):
            run.load_student(trust)
    student, _ = run.load_student(trust=("elsewhere", "test_trust"))
    assert type(student) is ConvNet
    # A function that is only imported there is still rejected.
    weights = "torchvision.models.resnet.ResNet18_Weights.DEFAULT.get_state_dict"
    for name in ("subprocess.run", weights, "torchvision.models.get_model"):
        with pytest.raises(InputError, match="--trust"):
            check_trusted({"_target_": f"test_trust.{name}"}, "x", ("test_trust",))
    check_trusted({"_target_": "test_trust.torchvision.models.resnet18"}, "x", ("test_trust",))


def own():
    return model()


@pytest.mark.parametrize(
    "target",
    [
        "kd_lightning.models.ConvNet",
        "torch.nn.Linear",
        "torchvision.models.resnet18",
        "torchvision.models.convnext.CNBlockConfig",
        "torch.nn.init.normal_",
        "torch.optim.lr_scheduler.CosineAnnealingLR",
        "torch.nn.functional.relu",
    ],
)
def test_models_and_layers_are_trusted(target):
    check_trusted({"_target_": target, "parts": [{"_target_": "torch.nn.ReLU"}]}, "student.model")


def test_untrusted_student_is_not_built(run):
    config = json.loads(json.dumps(CONFIG))
    config["student"]["model"] = {"_target_": "os.mkdir", "path": str(run.path / "made")}
    run.write_config(config)
    run.save_weights(model())
    with pytest.raises(InputError, match=r"^student\.model\._target_=os.mkdir .* rejected"):
        run.load_student()
    assert not (run.path / "made").exists()


def test_invalid_student_node_is_reported(run):
    for node in ({**MODEL, "depth": 3}, {"_target_": "kd_lightning.models.Nothing"}):
        run.write_config({**CONFIG, "student": {"model": node}})
        with pytest.raises(InputError, match=r"^student\.model"):
            run.load_student()
