"""CRD with a memory bank: which negatives are drawn, and what is stored and restored."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from test_relational_losses import batch_of, rows

from kd_lightning.losses import CRD, Context
from kd_lightning.losses.memory_bank import MemoryBank
from kd_lightning.losses.vectors import unit
from kd_lightning.models.features import Output


def bank(images=50, size=4, momentum=0.5):
    torch.manual_seed(0)
    return MemoryBank(images, size, momentum)


def fill(memory, index, labels):
    embeddings = unit(rows(len(index), 4)), unit(rows(len(index), 4))
    memory.update(index, labels, *embeddings, torch.zeros(2))
    return embeddings


def test_negatives_are_of_other_classes_and_different_in_every_step():
    memory = bank()
    labels = torch.arange(50) % 5
    fill(memory, torch.arange(40), labels[:40])
    index = torch.arange(40)
    drawn = memory.draw(index, labels[:40], 8)
    assert not drawn[:, 40:].any()  # not seen, while there are enough others
    assert not drawn[:, :40][labels[:40, None] == labels[:40]].any()
    assert float(drawn.sum()) == pytest.approx(8 * 40, rel=0.2)
    assert torch.equal(memory.draw(index, labels[:40], 8), drawn)
    fill(memory, torch.arange(40), labels[:40])
    assert not torch.equal(memory.draw(index, labels[:40], 8), drawn)


def test_images_that_are_not_seen_serve_until_there_are_enough_others():
    memory = bank()
    drawn = memory.draw(torch.tensor([3, 7]), torch.tensor([0, 0]), 49)
    assert drawn.sum(dim=1).tolist() == [49, 49]  # all except the image itself
    assert not drawn[0, 3]
    assert not drawn[1, 7]


def test_images_that_are_not_seen_only_make_up_for_missing_others():
    memory = bank(images=400)
    labels = torch.arange(400) % 2
    fill(memory, torch.arange(100), labels[:100])
    index = torch.arange(100, 200)
    drawn = memory.draw(index, labels[index], 80)
    other = labels[index, None] != labels
    assert torch.equal(drawn[:, :100], other[:, :100])  # all 50
    assert float(drawn[:, 100:].sum()) == pytest.approx(30 * 100, rel=0.1)


def test_images_that_are_never_seen_are_not_drawn_after_the_first_epoch():
    """Such as those for validation, here the last 40."""
    memory = bank(images=100)
    labels = torch.arange(100) % 2
    for index in torch.arange(60).split(20):
        assert memory.draw(index, labels[index], 50)[:, 60:].any()
        fill(memory, index, labels[index])
    assert not memory.complete
    index = torch.arange(10, 30)
    expected = labels[index, None] != labels
    expected[:, 60:] = False
    assert torch.equal(memory.draw(index, labels[index], 50), expected)
    fill(memory, index, labels[index])
    # Also for images that the first epoch has left out.
    index = torch.arange(60, 70)
    assert not memory.draw(index, labels[index], 50)[:, 60:].any()


def test_state_of_earlier_versions_is_loaded():
    memory = bank()
    index, labels = torch.arange(9), torch.arange(9) % 3
    for _ in range(2):
        fill(memory, index, labels)
    state = memory.state_dict()
    assert state["_extra_state"].tolist() == [memory.seed, 2, 1]
    other = bank()
    other.load_state_dict(state)
    assert other.complete
    assert torch.equal(other.draw(index, labels, 30), memory.draw(index, labels, 30))
    other.load_state_dict({**state, "_extra_state": state["_extra_state"][:2]})
    assert (other.seed, other.steps, bool(other.complete)) == (memory.seed, 2, False)
    assert torch.equal(other.draw(index, labels, 30), memory.draw(index, labels, 30))


def test_negatives_do_not_depend_on_the_order_of_the_batch():
    memory, index = bank(), torch.tensor([9, 2, 30, 4])
    labels = index % 3
    drawn, order = memory.draw(index, labels, 10), torch.tensor([2, 0, 3, 1])
    assert torch.equal(memory.draw(index[order], labels[order], 10), drawn[order])


def test_update_by_hand():
    memory = bank(momentum=0.75)
    before = memory.student.clone()
    index, labels = torch.tensor([5, 1]), torch.tensor([2, 0])
    student, _ = fill(memory, index, labels)
    expected = F.normalize(0.75 * before[index] + 0.25 * student)
    torch.testing.assert_close(memory.student[index], expected)
    assert torch.equal(memory.student[2:5], before[2:5])
    assert memory.labels[[0, 1, 5]].tolist() == [-1, 0, 2]
    assert memory.steps == 1
    memory.eval()
    fill(memory, index, labels)
    assert memory.steps == 1


def memory_term(**arguments):
    torch.manual_seed(0)
    term = CRD(size=4, memory=True, negatives=10, **arguments)
    term.setup(Context({"embedding": (6,)}, {"embedding": (7,)}, train_size=30))
    return term


def step(term, number):
    generator = torch.Generator().manual_seed(number)
    index = torch.randperm(30, generator=generator)[:8]
    vectors = [torch.randn(8, size, generator=generator) for size in (6, 7)]
    output = Output(torch.zeros(8, 3), {"embedding": vectors[0].requires_grad_()})
    loss = term(output, vectors[1], batch_of((index % 3).tolist(), index))
    loss.backward()
    return loss, vectors[0].grad


def test_memory_is_restored_bit_identically():
    term = memory_term()
    for number in range(3):
        step(term, number)
    state = {name: value.clone() for name, value in term.state_dict().items()}
    expected = [step(term, number) for number in (3, 4)]
    torch.manual_seed(1)
    other = CRD(size=4, memory=True, negatives=10)
    other.setup(Context({"embedding": (6,)}, {"embedding": (7,)}, train_size=30))
    other.load_state_dict(state)
    for number, (loss, gradient) in zip((3, 4), expected, strict=True):
        again = step(other, number)
        assert torch.equal(again[0], loss)
        assert torch.equal(again[1], gradient)
    for name, value in term.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_scale_is_that_of_the_first_batch():
    term = memory_term()
    step(term, 0)
    first = term.bank.log_scale
    assert first.all()
    step(term, 1)
    assert torch.equal(term.bank.log_scale, first)


@pytest.mark.parametrize("memory", [False, True])
def test_crd_is_computed_in_float32(memory):
    torch.manual_seed(0)
    term = CRD(size=4, memory=memory).eval()
    term.setup(Context({"embedding": (6,)}, {"embedding": (7,)}, train_size=30))
    student, teacher = Output(rows(3, 3), {"embedding": rows(3, 6)}), rows(3, 7)
    expected = term(student, teacher, batch_of([0, 1, 2]))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(term(student, teacher, batch_of([0, 1, 2])), expected)


def test_there_are_at_most_as_many_negatives_as_images():
    losses = []
    for negatives in (30, 100):
        term = memory_term()
        term.negatives = negatives
        losses.append(step(term, 0)[0])
    assert losses[0] == losses[1]


def test_memory_needs_the_number_of_images():
    with pytest.raises(ValueError, match="memory=true needs the number of training images"):
        CRD(memory=True).setup(Context({"embedding": (6,)}, {"embedding": (7,)}))


def test_mixed_images_count_as_the_class_of_the_larger_share():
    torch.manual_seed(0)
    term = CRD(size=4)
    term.setup(Context({"embedding": (6,)}, {"embedding": (7,)}))
    student, teacher = Output(rows(3, 3), {"embedding": rows(3, 6)}), rows(3, 7)
    mixed = batch_of(
        [0, 0, 0], partner_labels=torch.tensor([1, 1, 2]), ratio=torch.tensor([0.7, 0.3, 0.3])
    )
    assert term(student, teacher, mixed) == term(student, teacher, batch_of([0, 1, 2]))
    assert term(student, teacher, batch_of([0, 0, 0])) == 0


def test_defaults_are_those_of_the_authors():
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(CRD).parameters.items()
    }
    assert defaults == {
        "student_layer": "embedding", "teacher_layer": "embedding", "size": 128,
        "temperature": 0.07, "memory": False, "negatives": 16384, "momentum": 0.5,
    }  # fmt: skip
