"""Schedules: up to the learning rate, down to zero, however short the training."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_lightning.schedules import cosine, one_cycle


@pytest.mark.parametrize("schedule", [one_cycle, cosine])
@given(steps=st.integers(1, 300), warmup=st.floats(0, 0.99))
def test_schedules_rise_to_the_peak_and_fall_however_short(schedule, steps, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = schedule(optimizer, total_steps=steps, warmup_fraction=warmup)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    top = round(steps * warmup)
    assert all(rate > 0 for rate in rates[: top + 1])
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if top < steps:
        assert max(rates) == rates[top] == 0.5
