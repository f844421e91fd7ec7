"""Differentiable gathering of batches across processes, for relational terms."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from kd_lightning.losses import Targets, TermBatch
from kd_lightning.models.features import Output


def gather(
    output: Output, targets: Mapping[str, Targets], batch: TermBatch, size: int
) -> tuple[Output, dict[str, Targets], TermBatch]:
    """All-gather student outputs, targets and batches, in rank order.

    Gradients flow back to the process that computed an output.

    Args:
        output: student output of this process.
        targets: the teacher's targets for the terms.
        batch: labels, indices and view numbers.
        size: number of valid images in this process; may differ between processes.
    """
    device = output.logits.device
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    sizes[dist.get_rank()] = size
    dist.all_reduce(sizes)
    counts = sizes.tolist()

    def rows(value: Tensor) -> Tensor:
        here = value.to(device)[:size]
        padded = here.new_zeros(max(counts), *here.shape[1:])
        padded = torch.cat([here, padded[len(here) :]])
        parts = all_gather(padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    def every(value: Targets) -> Targets:
        if isinstance(value, Tensor):
            return rows(value)
        return {name: rows(part) for name, part in value.items()}

    whole = Output(rows(output.logits), {k: rows(v) for k, v in output.features.items()})
    labels, index, view = (rows(part) for part in (batch.labels, batch.index, batch.view))
    return (
        whole,
        {name: every(value) for name, value in targets.items()},
        TermBatch(
            labels,
            index.cpu(),
            view.cpu(),
            batch.progress,
            None if batch.partner_labels is None else rows(batch.partner_labels),
            None if batch.ratio is None else rows(batch.ratio),
        ),
    )
