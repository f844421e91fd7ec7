"""Validation of `_target_` nodes."""

import enum
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from kd_lightning.config.nodes import build, build_partial, check_node
from kd_lightning.config.type_hints import check_value
from kd_lightning.errors import InputError


class Mode(enum.Enum):
    FAST = "f"
    EXACT = "e"


def take(
    mode: Mode = Mode.FAST,
    maybe: Mode | None = None,
    kind: Literal["a", "b", 3] = "a",
    sizes: Sequence[int] = (1,),
    pair: tuple[int, int] = (1, 2),
    root: Path | None = None,
    scale: float | Tensor = 1.0,
    layer: Callable[..., nn.Module] = nn.ReLU,
    either: str | Callable[[], None] = "x",
    anything: Any = None,
    steps: list[int] = 3,  # type: ignore[assignment]  # annotations can be wrong
    parts: Sequence[Any] = (),
    table: dict[str, int] | None = None,
    block: type[nn.Module] | None = None,
    count: int = 1,
) -> dict[str, Any]:
    return dict(locals())


def node(**arguments):
    return {"_target_": f"{__name__}.take", **arguments}


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "FAST"},
        {"mode": "Mode.EXACT"},
        {"maybe": "EXACT"},
        {"maybe": None},
        {"kind": "b"},
        {"kind": 3},
        {"sizes": [1, 2]},
        {"pair": [3, 4]},
        {"root": "/tmp/x"},
        {"scale": 1},
        {"layer": {"_target_": "torch.nn.SiLU", "_partial_": True}},
        {"layer": {"_target_": "hydra.utils.get_class", "path": "torch.nn.SiLU"}},
        {"layer": {"_target_": "hydra.utils.get_method", "path": "torch.nn.SiLU"}},
        {"layer": {"_target_": "hydra.utils.get_object", "path": "torch.nn.SiLU"}},
        {"either": "relu"},
        {"anything": [1, {"a": "b"}]},
        {"steps": 4},
        {"parts": [{"_target_": "torch.nn.ReLU"}, {"_target_": "torch.nn.Linear",
                                                    "_args_": [2, 3]}]},
        {"parts": [[{"_target_": "torch.nn.Linear", "_partial_": True, "bias": False}]]},
        {"table": {"a": 1}},
        {"_convert_": "partial"},
    ],
)  # fmt: skip
def test_valid_nodes_are_accepted(arguments):
    check_node(node(**arguments), "it")
    build(node(**arguments), "it")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"mode": "SLOW"}, ["it.mode", "FAST, EXACT", "'SLOW'"]),
        ({"maybe": "slow"}, ["it.maybe", "null", "FAST, EXACT"]),
        ({"kind": "c"}, ["it.kind", "one of a, b, 3"]),
        ({"sizes": 3}, ["it.sizes", "a list"]),
        ({"sizes": "3"}, ["it.sizes", "a list"]),
        ({"pair": 3}, ["it.pair", "a list"]),
        ({"scale": "hot"}, ["it.scale", "a number"]),
        ({"root": 3}, ["it.root", "a path"]),
        ({"layer": "torch.nn.SiLU"}, ["{_target_: torch.nn.SiLU, _partial_: true}"]),
        ({"block": "torch.nn.SiLU"}, ["{_target_: hydra.utils.get_class, path: torch.nn.SiLU}"]),
        ({"table": 3}, ["it.table", "a dictionary"]),
        ({"count": True}, ["it.count", "a whole number"]),
        ({"count": 1.5}, ["it.count", "a whole number"]),
        ({"_patial_": True}, ["there is no key 'it._patial_'"]),
        ({"parts": [{"_target_": "torch.nn.Linear", "in_feature": 2}]}, ["it.parts[0].in_feature"]),
        ({"parts": [{"_target_": "torch.nn.Linaer"}]}, ["it.parts[0]._target_=torch.nn.Linaer"]),
        ({"anything": {"deep": {"_target_": "torch.nn.Linear"}}}, ["it.anything.deep.in_features"]),
        ({"layer": {"_target_": "torch.nn.Linear", "_partial_": True, "bais": 1}},
         ["did you mean it.layer.bias"]),
    ],
)  # fmt: skip
def test_invalid_nodes_are_rejected_with_one_sentence(arguments, parts):
    with pytest.raises(InputError) as refused:
        check_node(node(**arguments), "it")
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ([1, 2.5], Sequence[float]),
        ([], Sequence[int]),
        ("a", str | Sequence[str]),
        (["a"], str | Sequence[str]),
        ([["a", "b"], ["c", "d"]], Sequence[Sequence[str]] | None),
        ([1, 2], tuple[int, int]),
        ([1, 2, 3], tuple[int, ...]),
        ([1, "a"], list),
        ([1, "a"], tuple),
        ([1, "a"], Sequence[Any]),
        ([{"_target_": "torch.nn.ReLU"}], Sequence[Callable[..., nn.Module]]),
    ],
)
def test_lists_that_fit_an_exact_hint(value, hint):
    check_value(value, hint, "it", strict=True)


@pytest.mark.parametrize(
    ("value", "hint", "parts"),
    [
        ([1, "a"], Sequence[int], ["it[1]", "a whole number", "'a'"]),
        ([1.5], list[int], ["it[0]", "a whole number", "1.5"]),
        (["a", 2], str | Sequence[str], ["it[1]", "text", "2"]),
        ([["a"], ["b", 3]], Sequence[Sequence[str]] | None, ["it[1][1]", "text", "3"]),
        (["ab"], Sequence[Sequence[str]] | None, ["it[0]", "a list", "'ab'"]),
        ([None], Sequence[float], ["it[0]", "a number", "None"]),
        ([1], tuple[int, int], ["it", "2 values", "[1]"]),
        ([1, "b"], tuple[int, ...], ["it[1]", "a whole number", "'b'"]),
        (["a"], dict[str, int] | None, ["it", "a dictionary", "['a']"]),
        ({"a": 1}, Sequence[int], ["it", "a list", "{'a': 1}"]),
    ],
)
def test_elements_of_lists_are_checked_against_an_exact_hint(value, hint, parts):
    with pytest.raises(InputError) as refused:
        check_value(value, hint, "it", strict=True)
    for part in parts:
        assert part in str(refused.value)


def test_enum_member_by_name():
    built = build(node(mode="EXACT", maybe="Mode.FAST", either="FAST"), "it")
    assert (built["mode"], built["maybe"], built["either"]) == (Mode.EXACT, Mode.FAST, "FAST")
    assert build_partial(node(mode="EXACT"), "it")()["mode"] is Mode.EXACT
    nested = build(node(parts=[node(mode="e")]), "it")
    assert nested["parts"][0]["mode"] is Mode.EXACT


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        ("resnet18", {"weights": "DEFAULT", "progress": False}),
        ("resnet18", {"weights": "IMAGENET1K_V1"}),
        ("mobilenet_v3_small", {"weights": "MobileNet_V3_Small_Weights.IMAGENET1K_V1"}),
        ("vit_b_16", {"weights": None}),
        ("efficientnet_b0", {"norm_layer": {"_target_": "torch.nn.BatchNorm2d", "_partial_": True,
                                            "eps": 1e-3}}),
        ("MobileNetV2", {"width_mult": 0.5, "inverted_residual_setting": [[1, 16, 1, 1]]}),
        ("swin_t", {"dropout": 0}),
        ("alexnet", {"dropout": 0.1}),  # has the same name as its module
        ("googlenet", {"weights": "DEFAULT"}),
        ("regnet_y_400mf", {"activation": {"_target_": "torch.nn.SiLU", "_partial_": True}}),
    ],
)  # fmt: skip
def test_torchvision_builders_accept_documented_arguments(target, arguments):
    check_node({"_target_": f"torchvision.models.{target}", **arguments}, "student.model")


def test_weights_of_another_network_are_rejected():
    with pytest.raises(InputError, match="IMAGENET1K_V1"):
        check_node({"_target_": "torchvision.models.resnet18", "weights": "V7"}, "teacher.model")


def test_nested_partial_node_is_built():
    model = build(
        {
            "_target_": "torchvision.models.mobilenet_v3_small",
            "num_classes": 3,
            "norm_layer": {"_target_": "torch.nn.BatchNorm2d", "_partial_": True, "momentum": 0.2},
        },
        "student.model",
    )
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {module.momentum for module in norms} == {0.2}


def test_model_node_must_not_be_partial():
    with pytest.raises(InputError, match="_partial_"):
        build({"_target_": "torch.nn.ReLU", "_partial_": True}, "student.model")
    optimizer = build_partial(
        {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1}, "optimizer"
    )
    assert optimizer([nn.Parameter(torch.zeros(1))]).defaults["lr"] == 0.1


def test_failed_download_is_one_sentence(monkeypatch):
    def fail(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(InputError) as refused:
        build({"_target_": "torchvision.models.resnet18", "weights": "DEFAULT"}, "teacher.model")
    assert "teacher.model" in str(refused.value)
    assert "could not be downloaded" in str(refused.value)


def test_module_is_not_a_target():
    with pytest.raises(InputError, match="neither a class nor a function"):
        check_node({"_target_": "torch.nn"}, "student.model")


def test_target_that_is_replaced_is_the_new_one(monkeypatch):
    node = {"_target_": "torch.nn.ReLU", "inplace": True}
    assert type(build(node, "student.model")) is nn.ReLU
    monkeypatch.setattr(nn, "ReLU", nn.GELU)
    assert type(build({"_target_": "torch.nn.ReLU"}, "student.model")) is nn.GELU
