"""Measurement of latency and memory of finished runs' students and teachers, on this machine."""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.config.checks import of_one_process, single_teachers
from kd_lightning.config.hardware import find_device
from kd_lightning.config.nodes import Node, build
from kd_lightning.config.pretrained import with_own_input
from kd_lightning.config.resolve import resolve_trainer
from kd_lightning.config.stored import student_model
from kd_lightning.config.trust import check_trusted
from kd_lightning.errors import InputError
from kd_lightning.models.cost import measure_latency, peak_memory
from kd_lightning.models.preparing import (
    materialize,
    resize,
    takes_channels_last,
    to_memory_format,
)
from kd_lightning.reports.card_results import MEASURED
from kd_lightning.results import BATCHES
from kd_lightning.storage.provenance import device_name
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows.costs import count_costs

log = logging.getLogger(__name__)

BUSY = 0.5  # load per CPU, from which latencies are not to be trusted


class _Together(nn.Module):
    """The members of an ensemble, one after the other, each with the size of its images."""

    def __init__(self, members: Sequence[tuple[nn.Module, int]]) -> None:
        super().__init__()
        self.members = nn.ModuleList(network for network, _ in members)
        self.sizes = [size for _, size in members]

    def forward(self, images: Tensor) -> list[Any]:
        """Images (B, 3, H, W) to the output of every member."""
        members = zip(self.members, self.sizes, strict=True)
        return [member(resize(images, size)) for member, size in members]


def measure(
    run_dirs: Iterable[str | Path],
    device: str = "cpu",
    threads: int | None = None,
    seconds: float = 1.0,
    trust: Iterable[str] = (),
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Measure runs one after the other and add the figures to their `metrics.json`.

    They replace all of an earlier measurement, which may have been on another device.

    Equal networks are measured only once: latency does not depend on the weights. The networks run
    in float32 and in the memory format of `trainer.memory_format` on this device.

    Args:
        run_dirs: folders of finished runs.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads of the figures with all threads; None: as many as torch uses.
        seconds: time for each batch size and number of threads.
        trust: your own packages that a run may import; see `config.trust.check_trusted`.

    Yields:
        The folder of each run and its new figures.

    Raises:
        InputError: the device does not exist, a folder contains no finished run, or a file in it is
            damaged or refers to untrusted code; all folders are checked first.
    """
    trust = tuple(trust)
    place = find_device(device)
    runs = [(RunDirectory(folder), _checked(folder, trust)) for folder in dict.fromkeys(run_dirs)]
    _warn_if_busy()
    threads = threads or torch.get_num_threads()
    known: dict[str, dict[str, Any]] = {}
    for directory, config in runs:
        size = config["data"]["image_size"]
        student, _ = directory.load_student(trust)
        taught = directory.read_metrics().get("teacher_test_accuracy") is not None
        teachers = _teachers(config) if taught else []
        found: dict[str, Any] = count_costs(
            student, directory.path / "student.safetensors", teachers, size
        )
        nodes = [part["teacher"]["model"] for part in single_teachers(config)]
        sizes = [teacher_size for _, teacher_size in teachers]
        networks: dict[str, tuple[nn.Module, Any]] = {"": (student, student_model(config))}
        if teachers:
            networks["teacher_"] = (_Together(teachers), [nodes, sizes])
        for prefix, (network, node) in networks.items():
            channels_last = _channels_last(config, place) and takes_channels_last(network, size)
            key = json.dumps([node, size, channels_last], sort_keys=True, default=str)
            if key not in known:
                network = network.eval().to(place)
                known[key] = _figures(network, size, channels_last, place, threads, seconds)
                network.cpu()
            found |= {f"{prefix}{name}": value for name, value in known[key].items()}
        found["measured_on"] = _measured_on(place, threads)
        with directory.lock():
            metrics = directory.read_metrics()
            old = (*MEASURED, *(("teacher_macs", "teacher_bytes") if not taught else ()))
            kept = {key: metrics[key] for key in metrics if not key.startswith(old)}
            directory.write_metrics({**kept, **found})
        yield directory.path, found


def _figures(
    network: nn.Module,
    size: int,
    channels_last: bool,
    device: torch.device,
    threads: int,
    seconds: float,
) -> dict[str, Any]:
    """Latency in milliseconds and memory in bytes, by the names of `results.FIGURES`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    to_memory_format(network, layout)
    used = {"one_thread": 1, "all_threads": threads} if device.type == "cpu" else {"all_threads": 1}
    found: dict[str, Any] = {}
    for batch in BATCHES:
        images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=layout)
        for how, number in used.items():
            latency = measure_latency(network, images, number, seconds)
            found[f"latency_{batch}_{how}_p50"] = round(latency.p50, 4)
            found[f"latency_{batch}_{how}_p95"] = round(latency.p95, 4)
        found[f"memory_{batch}"] = peak_memory(network, images)
    return found


def _checked(folder: str | Path, trust: Iterable[str]) -> Node:
    """The configuration of a finished run whose models may be built."""
    directory = RunDirectory(folder)
    config, status = directory.read_config(), directory.read_metrics().get("status")
    if status != "finished":
        raise InputError(f"{folder} contains no finished run (status: {status})")
    check_trusted(student_model(config), "student.model", trust)
    for part in single_teachers(config):
        if not part["teacher"].get("outputs"):
            check_trusted(part["teacher"]["model"], "teacher.model", trust)
    return config


def _teachers(config: Node) -> list[tuple[nn.Module, int]]:
    """The networks of the configured teacher, with initial weights, and the sizes of their images;
    none of a packed teacher.
    """
    networks: list[tuple[nn.Module, int]] = []
    for part in single_teachers(config):
        if part["teacher"].get("outputs"):
            return []
        section = with_own_input(part["teacher"], "teacher", config["data"])
        size = section.get("image_size") or config["data"]["image_size"]
        network: nn.Module = build(section["model"], "teacher.model")
        materialize(network, size, "teacher.model")
        networks.append((network.eval(), size))
    return networks


def _channels_last(config: Node, device: torch.device) -> bool:
    trainer = {**of_one_process(config["trainer"]), "accelerator": device.type}
    return resolve_trainer(trainer, student_model(config)).channels_last


def _load() -> float | None:
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):  # Windows
        return None


def _warn_if_busy() -> None:
    load = _load()
    if load is not None and load > BUSY:
        log.warning(
            "this machine is busy (load %.1f per CPU): latencies are too high; "
            "measure again when nothing else runs", load,
        )  # fmt: skip


def _measured_on(device: torch.device, threads: int) -> str:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        name = device_name(device)
    finally:
        torch.set_num_threads(before)
    load = _load()
    busy = "" if load is None else f", load {load:.1f} per CPU"
    return f"{name}, torch {torch.__version__}{busy}"
