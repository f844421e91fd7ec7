"""Values and gradients of the authors' own implementations; see `tests/reference/README.md`.

@pytest.mark.parametrize("case", cases("logits", "KD"))
def test_kd(case):
    case.check(lambda student, teacher: soft_target_loss(student, teacher, case.params["T"]))
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).with_name("reference")
RELATIVE, ABSOLUTE = 1e-9, 1e-13

Tensors = dict[str, Tensor | list[Tensor]]


@cache
def _read(family: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{family}.json").read_text())


def make_tensor(family: str, name: str) -> Tensor:
    """A tensor of a family, float64 or int64, from its values or its recipe."""
    spec = _read(family)["tensors"][name]
    shape, recipe = spec["shape"], spec.get("recipe")
    if recipe is None:
        dtype = torch.int64 if spec.get("dtype") == "int64" else torch.float64
        return torch.tensor(_numbers(spec["data"]), dtype=dtype).view(shape)
    if "constant" in recipe:
        return torch.full(shape, recipe["constant"], dtype=torch.float64)
    if "repeat_first_row_of" in recipe:
        return make_tensor(family, recipe["repeat_first_row_of"])[:1].repeat(recipe["times"], 1)
    if "affine_of" in recipe:
        return make_tensor(family, recipe["affine_of"]) * recipe["mul"] + recipe["add"]
    if "copy_of" in recipe:
        copy = make_tensor(family, recipe["copy_of"])
        copy[1] = copy[recipe["row_1_replaced_by_row"]]
        return copy
    values = np.random.default_rng(recipe["seed"]).standard_normal(shape)
    values = torch.from_numpy(values * recipe.get("scale", 1.0) + recipe.get("shift", 0.0))
    return values.clamp(min=0) if recipe.get("relu") else values


def _numbers(values: Any) -> Any:
    """Numbers, with the strings ``nan``, ``inf`` and ``-inf`` converted."""
    if isinstance(values, list):
        return [_numbers(value) for value in values]
    return float(values) if isinstance(values, str) else values


@dataclass(frozen=True)
class Case:
    """The value of a published loss for one set of inputs.

    Attributes:
        family: the file, without its suffix.
        content: the case as it is stored.
    """

    family: str
    content: dict[str, Any]

    @property
    def id(self) -> str:
        """Unique name: method, implementation, inputs and parameters."""
        return self.content["id"]

    @property
    def method(self) -> str:
        """The name of the loss; see the README."""
        return self.content["method"]

    @property
    def params(self) -> dict[str, Any]:
        """The authors' parameters, with their names."""
        return self.content["params"]

    @property
    def expected(self) -> dict[str, Any]:
        """``loss`` and ``grads``: the authors' values, or the right ones if theirs are wrong."""
        return self.content.get("right") or self.content

    def from_repository(self, *owners: str) -> bool:
        """Whether one of the implementations with this value is in a repository `owner/name`."""
        sources = [self.content["source"], *self.content.get("same", ())]
        return any(source.split()[0] in owners for source in sources)

    def inputs(self) -> Tensors:
        """New input tensors by name, or lists of them; float64 ones require gradients."""

        def make(name: str | list[str]) -> Any:
            if isinstance(name, list):
                return [make(each) for each in name]
            tensor = make_tensor(self.family, name)
            return tensor.requires_grad_(tensor.is_floating_point())

        return {argument: make(name) for argument, name in self.content["inputs"].items()}

    def check(self, loss: Callable[..., Tensor], *, gradients: bool = True) -> None:
        """Compare the value and the gradients of a loss with those of the case.

        Args:
            loss: called with the case's inputs as keyword arguments; returns a scalar.
            gradients: False to compare the value only.
        """
        self.compare(inputs := self.inputs(), loss(**inputs), gradients=gradients)

    def compare(self, inputs: Tensors, loss: Tensor, *, gradients: bool = True) -> None:
        """Like `check`, for a loss that has been computed already.

        Gradients that the authors' code does not define need only be finite, which also holds at
        points where the loss is not differentiable.
        """
        assert loss.shape == ()
        assert loss.dtype == torch.float64
        wanted = self.expected.get("loss")
        assert loss.isfinite()
        if wanted is not None and math.isfinite(wanted := float(wanted)):
            assert loss.item() == pytest.approx(wanted, rel=RELATIVE, abs=ABSOLUTE)
        names = [name for name in self.content["grads"] if self._tensors(inputs[name])]
        if not (gradients and names and loss.requires_grad):
            return
        flat = [tensor for name in names for tensor in self._tensors(inputs[name])]
        found = iter(torch.autograd.grad(loss, flat, allow_unused=True, retain_graph=True))
        digests = self.expected.get("grads", {})
        for name in names:
            expected = digests.get(name)
            for place, tensor in enumerate(self._tensors(inputs[name])):
                gradient = next(found)
                gradient = torch.zeros_like(tensor) if gradient is None else gradient
                assert gradient.isfinite().all(), f"gradient of {name}"
                digest = expected[place] if isinstance(expected, list) else expected
                if digest is not None and not self.content.get("singular_gradient"):
                    check_digest(gradient, digest, name)

    @staticmethod
    def _tensors(value: Tensor | list[Tensor]) -> list[Tensor]:
        tensors = value if isinstance(value, list) else [value]
        return [tensor for tensor in tensors if tensor.is_floating_point()]


def check_digest(tensor: Tensor, digest: dict[str, Any], name: str = "tensor") -> None:
    """Compare a tensor with its stored values, or with sums over them; relative to its norm."""
    assert list(tensor.shape) == digest["shape"], name
    flat = tensor.detach().flatten().double()
    if "data" in digest:
        wanted = torch.tensor(_numbers(digest["data"]), dtype=torch.float64)
        if wanted.isfinite().all():
            tolerance = RELATIVE * float(wanted.norm()) + ABSOLUTE
            torch.testing.assert_close(flat, wanted, rtol=0, atol=tolerance, msg=name)
        return
    norm, count = float(digest["l2"]), len(flat)
    if not math.isfinite(norm):
        return
    place = torch.arange(1, count + 1, dtype=torch.float64)
    tolerance = RELATIVE * norm + ABSOLUTE
    assert float(flat.norm()) == pytest.approx(norm, abs=tolerance, rel=0), name
    # A sum of n terms has a rounding error of about sqrt(n) times theirs.
    scale = tolerance * math.sqrt(count)
    assert float(flat.sum()) == pytest.approx(float(digest["sum"]), abs=scale, rel=0), name
    weighted = float((place * flat).sum())
    assert weighted == pytest.approx(float(digest["wsum"]), abs=scale * count, rel=0), name
    first = torch.tensor(_numbers(digest["first5"]), dtype=torch.float64)
    torch.testing.assert_close(flat[: len(first)], first, rtol=0, atol=tolerance, msg=name)


def cases(family: str, *methods: str, where: Callable[[Case], bool] | None = None) -> list[Any]:
    """The cases of some methods, as parameters of a test.

    Args:
        family: ``logits``, ``maps`` or ``embeddings``.
        methods: as they are called there; see the README.
        where: selects cases.

    Raises:
        ValueError: there is none, so that the test would pass without testing anything.
    """
    every = [Case(family, content) for content in _read(family)["cases"]]
    found = [
        pytest.param(case, id=case.id)
        for case in every
        if case.method in methods and (where is None or where(case))
    ]
    if not found:
        raise ValueError(f"no case of {methods} in {family}")
    return found
