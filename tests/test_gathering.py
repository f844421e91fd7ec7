"""Gathering: relational terms get the batches of all processes, with gradients."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_distillation import frozen, make_module
from test_terms import Relations
from torch import nn

from kd_lightning.distill.gathering import gather
from kd_lightning.engine.launch import launch
from kd_lightning.errors import RunError
from kd_lightning.losses import TermBatch
from kd_lightning.models.features import Output

ROWS = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def loss_of(model, rows, targets, size):
    index = torch.arange(len(rows))
    batch = TermBatch(index, index, index)
    output = Output(model(rows), {"layer": model(rows)})
    output, targets, batch = gather(output, {"a": targets, "b": {"c": targets}}, batch, size)
    assert torch.equal(targets["a"], targets["b"]["c"])
    assert torch.equal(output.features["layer"], output.logits)
    assert len(batch.labels) == len(output.logits)
    return Relations()(output, targets["a"], batch)


def work(sizes):
    """The gradient of this process, before DDP averages it."""
    dist.init_process_group("gloo", world_size=2, rank=_rank())
    ours = slice(0, sizes[0]) if _rank() == 0 else slice(sizes[0], sum(sizes))
    # A process without images gets one of weight 0.
    rows, targets = (x[ours] if sizes[_rank()] else x[:1] for x in (ROWS, TARGETS))
    model = network()
    loss = loss_of(model, rows, targets, sizes[_rank()])
    loss.backward()
    dist.all_reduce(model.weight.grad)
    return float(loss.detach()), (model.weight.grad / 2).tolist()


def _rank():
    import os

    return int(os.environ["LOCAL_RANK"])


@pytest.mark.parametrize("sizes", [(4, 3), (7, 0)])
def test_gathered_loss_and_gradient_equal_those_of_the_whole_batch(sizes):
    model = network()
    index = torch.arange(7)
    loss = Relations()(Output(model(ROWS), {}), TARGETS, TermBatch(index, index, index))
    loss.backward()
    value, gradient = launch(2, work, sizes)
    assert value == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(torch.tensor(gradient), model.weight.grad, rtol=1e-4, atol=1e-6)


def fails(where, how):
    if _rank() == where:
        raise how
    return "fine"


def test_error_of_rank_0_is_raised_unchanged():
    with pytest.raises(RunError, match="of rank 0"):
        launch(2, fails, 0, RunError("of rank 0"))


def test_error_of_another_worker_names_it():
    with pytest.raises(RunError, match="worker 1 of 2: disk is full"):
        launch(2, fails, 1, OSError("disk is full"))


def test_gathered_terms_are_not_weighted_by_the_share_of_a_process():
    terms = {
        "cross_entropy": {"_target_": "kd_lightning.losses.CrossEntropy", "weight": 1.0},
        "mine": {"_target_": "test_terms.Relations", "weight": 1.0},
    }
    module = make_module(frozen(), terms=terms)
    losses = {"cross_entropy": torch.tensor(2.0), "mine": torch.tensor(3.0)}
    for processes, expected in ((1, 5.0), (2, 2 * 0.5 + 3)):
        module._trainer = SimpleNamespace(world_size=processes)
        loss = module._of_this_process(torch.tensor(5.0), losses, {"loss_weight": 0.5})
        assert loss == expected
