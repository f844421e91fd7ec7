"""Reduced rows of logits: exact where they say so, bounded errors elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from test_ensemble import teacher

from kd_lightning.distill.ensemble import Ensemble
from kd_lightning.distill.targets import TeacherTargets
from kd_lightning.distill.top_k import chosen_k, reduce, restore
from kd_lightning.losses import DIST, DKD, MLKD, NKD, HardLabel, Logit, LogitTerm
from kd_lightning.losses.logit import soft_target_loss
from kd_lightning.storage.rows import DTYPES, Rows
from kd_lightning.storage.teacher_cache import stored


def logits(classes=1000, count=256, seed=0):
    """Gaussian logits, skewed, with one likely class each."""
    generator = torch.Generator().manual_seed(seed)
    values = 1.5 * torch.randn(count, classes, generator=generator)
    values += 0.3 * torch.randn(count, classes, generator=generator).exp()
    likely = torch.randint(0, classes, (count, 1), generator=generator)
    return values.scatter_add(1, likely, torch.full((count, 1), 6.0))


def rest_mass(probabilities, dense, k):
    return 1 - probabilities.gather(1, dense.topk(k, dim=1).indices).sum(dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [200, 1000, 30_000])
def test_largest_logits_and_their_classes_are_kept(classes, dtype):
    dense = logits(classes, count=32).to(DTYPES[dtype]).float()
    back = restore(reduce(dense, 10).to(DTYPES[dtype]), classes, 1.0)
    index = dense.topk(10, dim=1).indices
    assert torch.equal(back.gather(1, index), dense.gather(1, index))


def test_probabilities_are_exact_at_temperature_1():
    dense = logits()
    back = restore(reduce(dense, 10), 1000, 1.0)
    exact, found = dense.softmax(1), back.softmax(1)
    index = dense.topk(10, dim=1).indices
    torch.testing.assert_close(found.gather(1, index), exact.gather(1, index))
    # The rest is uniform, with the right sum.
    others = found.scatter(1, index, 0.0)
    assert torch.allclose(others.max(1).values * 990, rest_mass(exact, dense, 10), atol=1e-5)


@pytest.mark.parametrize(
    ("temperature", "bound"),
    [(0.7, 0.1), (1.0, 1e-5), (1.5, 0.02), (2.0, 1e-5), (3.0, 0.02), (4.0, 1e-5), (9.0, 0.02)],
)
def test_share_of_the_rest_at_any_temperature(temperature, bound):
    dense = logits()
    exact = (dense / temperature).softmax(1)
    found = (restore(reduce(dense, 10), 1000, temperature) / temperature).softmax(1)
    error = (rest_mass(found, dense, 10) - rest_mass(exact, dense, 10)).abs()
    assert error.mean() < bound


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0, 3.0, 4.0, 10.0])
@pytest.mark.parametrize("kind", ["wide", "two groups", "impossible classes", "one fallen"])
def test_unusual_logits_keep_their_largest_class(kind, temperature):
    dense = torch.randn(64, 1000, generator=torch.Generator().manual_seed(1)) * 2
    if kind == "wide":
        dense *= 15
    elif kind == "two groups":
        dense[:, 500:] -= 30
    elif kind == "impossible classes":
        dense[:, 500:] = -torch.inf
    else:
        dense[:, 3] = -1e30
    back = restore(reduce(dense, 10).half(), 1000, temperature)
    assert back.isfinite().all()
    chosen = back.argmax(1, keepdim=True)
    assert torch.allclose(dense.gather(1, chosen), dense.amax(1, keepdim=True), atol=0.05)
    if temperature in (1.0, 2.0, 4.0):
        exact, found = (dense / temperature).softmax(1), (back / temperature).softmax(1)
        error = rest_mass(found, dense, 10) - rest_mass(exact, dense, 10)
        assert error.abs().max() < 0.02


@pytest.mark.parametrize(
    ("distance", "temperature", "cosine"),
    [("far", 1.0, 0.998), ("far", 2.0, 0.99), ("far", 4.0, 0.87),
     ("near", 1.0, 0.96), ("near", 2.0, 0.7), ("near", 4.0, 0.35)],
)  # fmt: skip
def test_direction_of_the_gradient(distance, temperature, cosine):
    dense = logits()
    noise = torch.randn(dense.shape, generator=torch.Generator().manual_seed(10))
    student = (0.5 * dense + noise if distance == "far" else dense + 0.5 * noise).requires_grad_()
    gradients = [
        torch.autograd.grad(soft_target_loss(student, target, temperature), student)[0].flatten()
        for target in (dense, restore(reduce(dense, 10).half(), 1000, temperature))
    ]
    assert F.cosine_similarity(*gradients, dim=0) > cosine


def test_fifty_views_of_imagenet_fit_into_five_gigabytes(tmp_path):
    width = reduce(torch.randn(1, 1000), 10).shape[1]
    rows = Rows(tmp_path, {}, 1_281_167, (width,), torch.float16)
    assert 50 * rows.file_size < 5e9


@pytest.mark.parametrize(
    ("setting", "classes", "k"),
    [("auto", 128, None), ("auto", 129, 10), (None, 1000, None), (5, 10, 5), (10, 10, None)],
)
def test_number_of_stored_logits(setting, classes, k):
    assert chosen_k(setting, classes) == k


@pytest.mark.parametrize("members", [(), ("teacher.members=[{seed: 0},{seed: 1}]",)])
def test_training_with_reduced_rows(train, tmp_path, members):
    short = ("method=combined", "trainer.max_epochs=1", *members)
    command = (*short, "remember.top_k=1")
    first, second = train(*command), train(*command)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    weights = [(done.runs[0] / "student.safetensors").read_bytes() for done in (first, second)]
    assert weights[0] == weights[1]  # computed and cached targets are the same
    entries = stored(tmp_path / "outputs" / "teachers" / "remembered")
    shapes = {e.folder.name.split("-")[1]: e.geometry["shape"] for e in entries}
    assert shapes["logit"] == [7]
    assert shapes["evaluation"] == [3]  # accuracies are exact
    dense = train(*short)
    assert (dense.runs[0] / "student.safetensors").read_bytes() != weights[0]
    assert dense.metrics["config_key"] != first.metrics["config_key"]
    assert dense.metrics["teacher_test_accuracy"] == first.metrics["teacher_test_accuracy"]


def test_logits_are_reduced_without_a_cache_too(train):
    command = ("method=logit", "trainer.max_epochs=1", "remember.top_k=1")
    exact = ("remember.dtype=float32", "teacher.trainer.max_epochs=1")
    runs = [train(*command, *exact, f"remember.disk_gb={size}", f"name=x{size}") for size in (1, 0)]
    assert [done.code for done in runs] == [0, 0], runs[1].err
    cached, live = [done.metrics for done in runs]
    assert cached["config_key"] == live["config_key"]
    weights = [(done.runs[0].parent / name / "student.safetensors").read_bytes()
               for done, name in zip(runs, ("x1", "x0"), strict=True)]  # fmt: skip
    assert weights[0] == weights[1]


class Negated(Logit):
    """Other targets than the logits."""

    def remember(self, teacher):
        return -teacher.logits.float()


@pytest.mark.parametrize(
    ("kind", "reduced"),
    [
        (Logit(), True),
        (HardLabel(), True),
        (Logit(standardize=True), False),
        (DKD(), False),
        (DIST(), False),
        (NKD(), False),
        (MLKD(), False),
        (Negated(), False),
        (LogitTerm(), False),
    ],
)
def test_terms_whose_logits_are_reduced(kind, reduced):
    """Only those for which the class probabilities are enough; of an ensemble, if all are."""
    images = torch.randn(5, 3, 16, 16)
    single = TeacherTargets(teacher(0), {"a": Logit(), "b": kind}, classes=3)
    both = TeacherTargets(Ensemble([teacher(0), teacher(1)]), {"a": Logit(), "b": kind}, classes=3)
    for targets in (single, both):
        names = ("a", "b") if targets is single else ("/0", "/1")
        assert not any(targets.is_reduced(name) for name in names)
        dense = targets.of_terms(targets.ask(images))
        targets.top_k = 1
        widths = {name: rows.shape[1] for name, rows in targets.ask(images).items()}
        first = reduced if targets is both else True
        expected = dict(zip(names, (first, reduced), strict=True))
        assert {name: targets.is_reduced(name) for name in names} == expected
        assert widths == {name: 7 if known else 3 for name, known in expected.items()}
        assert not targets.is_reduced("c")
        for name, value in targets.of_terms(targets.ask(images)).items():
            assert value.shape == (5, 3)
            if not reduced and name == "b":
                assert torch.equal(value, dense[name])


def test_invalid_top_k_is_rejected(train):
    done = train("method=logit", "remember.top_k=0")
    assert done.code == 2
    assert "remember.top_k must be auto, null or a whole number of at least 1, not 0" in done.err


@pytest.mark.parametrize("members", [1, 2])
def test_logits_are_restored_at_the_temperature_of_the_term(members):
    images, terms = torch.randn(5, 3, 16, 16), {"a": Logit(1.0), "b": Logit(4.0)}
    networks = [teacher(number) for number in range(members)]
    whole = Ensemble(networks) if members > 1 else networks[0]
    targets = TeacherTargets(whole, terms, classes=3)
    exact = targets.of_terms(targets.ask(images))
    targets.top_k = 1
    found = targets.of_terms(targets.ask(images))
    for name, temperature in (("a", 1.0), ("b", 4.0)):
        p, q = ((each[name] / temperature).softmax(dim=1) for each in (exact, found))
        if members == 1:
            largest = p.argmax(dim=1, keepdim=True)
            torch.testing.assert_close(q.gather(1, largest), p.gather(1, largest))
        else:
            assert not torch.allclose(found["a"], found["b"])
