"""Benchmark of the training speed, compared with bare PyTorch and with a common implementation.

    python scripts/benchmark.py
    python scripts/benchmark.py --students small --methods logit --repetitions 9
    python scripts/benchmark.py --augmentations --students small
    python scripts/benchmark.py --costs --students medium -- teacher=resnet9
    python scripts/benchmark.py --grid      # total time of nine distilled students

For each student and method, images per second of

- live: `train.py` with the teacher computing: Lightning, torchmetrics, the data module rendering
  new views of every batch, TensorBoard, callbacks;
- bare: a loop of the same computation on prepared batches, with only forward, loss, backward,
  clipping, optimizer and scheduler;
- remembered: `train.py` with cached teacher outputs; `rem./none` compares it with the student
  without a teacher, measured in alternation;
- plain (with --plain): a common implementation of distillation, `plain_distillation.py`.

With --augmentations, images per second of `train.py` without a teacher for each choice of the group
`augmentation`, and the time of a step relative to `standard`.

With --costs, the time of a step of every method, live and remembered, relative to `none`.

They alternate in one process. Figures are medians; a ratio is the median of the ratios within a
round. `of peak` is the fraction of this machine's measured matrix-product rate (4096 x 4096, in the
training precision) that the remembered loop (for `none` the live one) reaches. Images and weights
are random, which does not affect the time.
"""

import argparse
import gc
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import Peak, forget_peak_memory, peak_memory
from plain_distillation import plain_loop
from training_loops import bare_loop, configuration, device_of, whole_loop

from kd_lightning.config.plan import Plan
from kd_lightning.config.tree import tree_folder
from kd_lightning.engine.quiet import quiet_lightning
from kd_lightning.storage.provenance import device_name
from kd_lightning.terminal import positive

METHODS = ("none", "logit", "attention", "combined")
STUDENTS = ("small", "medium", "large")
AUGMENTATIONS = ("none", "standard", "cutout", "mixup", "cutmix", "strong")
SECONDS = 3.0  # target duration of a measurement


def compare(student: str, arguments: argparse.Namespace, peak: Peak) -> None:
    """Measure one student with every method, and print one row per method."""
    methods = ["none", *(method for method in arguments.methods if method != "none")]
    plans = {m: configuration(m, student, arguments.overrides) for m in methods}
    # A short measurement first, to determine the number of steps.
    batch = plans["none"].data.node["batch_size"]
    steps = {}
    for method, plan in plans.items():
        speed = bare_loop(plan, steps=3)
        steps[method] = max(5, round(SECONDS * speed / batch))
    rounds: list[dict[tuple[str, str], float]] = []
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        remembered_in = Path(folder)
        for method in reversed(methods[1:]):  # `combined` first: it fills the cache for the others
            whole_loop(plans[method], steps["none"], remembered_in, epochs=1)
        for turn in range(arguments.repetitions):
            found: dict[tuple[str, str], float] = {}
            for method, plan in plans.items():
                found[method, "bare"] = bare_loop(plan, steps[method])
                gc.collect()  # trainers have reference cycles
                forget_peak_memory()
                found[method, "live"] = whole_loop(plan, steps[method])
                memory[method] = peak_memory()
                if method == "none":
                    continue
                # In alternating order: the ratio is close to 1, and the machine's speed drifts by
                # more than the difference.
                pair = [("none", None), ("remembered", remembered_in)]
                for what, where in pair if turn % 2 else reversed(pair):
                    chosen = plan if where else plans["none"]
                    found[method, what] = whole_loop(chosen, steps["none"], where)
                if arguments.plain:
                    found[method, "plain"] = plain_loop(plan, steps=4)
            rounds.append(found)

    def middle(method: str, what: str, per: str | None = None) -> float | None:
        if any((method, needed) not in rounds[0] for needed in (what, per or what)):
            return None
        return statistics.median(r[method, what] / (r[method, per] if per else 1) for r in rounds)

    for method, plan in plans.items():
        if method not in arguments.methods:
            continue
        remembered = middle(method, "remembered")
        best = remembered or middle(method, "live")
        assert best is not None
        cells = [
            number(middle(method, "bare")),
            number(middle(method, "live")),
            number(middle(method, "live", "bare"), 3),
            number(remembered),
            number(middle(method, "remembered", "none"), 3),
            f"{100 * peak.share(plan, best):.0f} %",
            f"{memory[method]:.2f} GB",
        ]
        if arguments.plain:
            cells += [
                number(middle(method, "plain")),
                number(middle(method, "live", "plain"), 1),
                number(middle(method, "remembered", "plain"), 1),
            ]
        print(row(method, student, *cells), flush=True)


def compare_augmentations(student: str, repetitions: int, overrides: list[str]) -> None:
    """Measure one student with every augmentation, and print one row per augmentation."""
    plans = {
        name: configuration("none", student, [f"augmentation={name}", *overrides])
        for name in AUGMENTATIONS
    }
    steps = round(
        SECONDS * bare_loop(plans["standard"], 3) / plans["standard"].data.node["batch_size"]
    )
    rounds = []
    for turn in range(repetitions):
        order = list(plans) if turn % 2 else list(reversed(plans))
        rounds.append({name: whole_loop(plans[name], max(5, steps)) for name in order})
    for name in plans:
        speed = statistics.median(found[name] for found in rounds)
        cost = statistics.median(found["standard"] / found[name] for found in rounds)
        print(row(name, student, number(speed), number(cost, 3)), flush=True)


def compare_costs(student: str, repetitions: int, overrides: list[str]) -> None:
    """Measure one student with every method file, and print one row per method."""
    folder = Path(tree_folder()) / "method"
    names = sorted(path.stem for path in folder.glob("*.yaml") if path.stem != "none")
    none = configuration("none", student, overrides)
    steps = max(5, round(SECONDS * bare_loop(none, 3) / none.data.node["batch_size"]))
    for name in names:
        plan = configuration(name, student, overrides)
        rounds: list[dict[str, float]] = []
        with tempfile.TemporaryDirectory() as place:
            ways: dict[str, tuple[Plan, int, Path | None]] = {"none": (none, steps, None)}
            if plan.teachers:
                ways["remembered"] = plan, steps, Path(place)
                whole_loop(plan, steps, Path(place), epochs=1)
            ways["live"] = plan, max(3, steps // 4 if plan.teachers else steps), None
            for turn in range(repetitions):
                order = list(ways) if turn % 2 else list(reversed(ways))
                rounds.append({way: whole_loop(*ways[way]) for way in order})
                gc.collect()  # trainers have reference cycles
        costs = [
            statistics.median(found["none"] / found[way] for found in rounds)
            if way in ways
            else None
            for way in ("remembered", "live")
        ]
        print(row(name, student, *(number(cost, 2) for cost in costs)), flush=True)


def measure_grid(overrides: list[str], epochs: int) -> None:
    """Compare nine distilled students with nine without a teacher, each nine by one command."""
    # `combined` first: it fills the cache for the other two.
    methods = [method for method in reversed(METHODS) if method != "none"]
    expected = estimate(methods, overrides, epochs)
    distilled = [f"method={','.join(methods)}", f"student={','.join(STUDENTS)}", "seed=0"]
    with tempfile.TemporaryDirectory() as folder:
        fixed = [
            f"output_dir={folder}", f"data_dir={folder}", f"trainer.max_epochs={epochs}",
            "data._target_=random_images.RandomImages", "~data.root",
            "teacher.trainer.max_epochs=1", "+teacher.trainer.max_steps=1",
            *overrides,
        ]  # fmt: skip
        # Create the (untrained) teacher; its cached outputs are removed again.
        command("method=logit", "student=small", "remember.disk_gb=0", "setting=teacher", *fixed)
        title = f"nine students, {epochs} epochs, end to end"
        print(f"{title:40}{'expected':>12}{'measured':>12}{'ratio':>8}")
        baseline = 0.0
        for name, arguments in {
            "without a teacher": ["method=none", distilled[1], "seed=0,1,2"],
            "distilled, nothing remembered yet": distilled,
            "distilled, everything remembered": distilled,
            "distilled, remembering switched off": [*distilled, "remember.disk_gb=0"],
        }.items():
            # A separate setting, so that a command does not find the runs of another.
            own = f"setting={name.replace(',', '').replace(' ', '-')}"
            seconds = command("-m", *arguments, own, "~hydra.callbacks.results", *fixed)
            baseline = baseline or seconds
            print(
                f"{name:40}{expected[name]:10.0f} s{seconds:10.0f} s{seconds / baseline:8.2f}",
                flush=True,
            )


def estimate(methods: list[str], overrides: list[str], epochs: int) -> dict[str, float]:
    """Seconds of pure training, estimated from a short measurement of every cell."""
    images = 45_000 * epochs
    alone = live = remembered = first_pass = 0.0
    for student in STUDENTS:
        plan = configuration("none", student, overrides)
        alone += 3 * images / whole_loop(plan, steps=40)
        with tempfile.TemporaryDirectory() as folder:
            for method in methods:
                plan = configuration(method, student, overrides)
                slow = images / whole_loop(plan, steps=8)
                fast = images / whole_loop(plan, 40, Path(folder))
                live, remembered = live + slow, remembered + fast
                first_pass = first_pass or slow - fast
    return {
        "without a teacher": alone,
        "distilled, nothing remembered yet": remembered + first_pass,
        "distilled, everything remembered": remembered,
        "distilled, remembering switched off": live,
    }


def command(*arguments: str) -> float:
    """Run `train.py` with these arguments in a new process; return its duration in seconds."""
    here = Path(__file__).resolve().parent
    paths = [str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "from kd_lightning.cli import main; main()", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - began


def row(method: str, student: str, *cells: str) -> str:
    """A row of the table."""
    return f"{method:10} {student:7}" + "".join(f"{cell:>11}" for cell in cells)


def number(value: float | None, digits: int = 0) -> str:
    """Format a number; a dash if missing."""
    return "-" if value is None else f"{value:,.{digits}f}"


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--students", nargs="+", default=STUDENTS, choices=STUDENTS)
    parser.add_argument("--repetitions", type=positive, default=5)
    parser.add_argument("--plain", action="store_true", help="the common implementation, too")
    parser.add_argument("--augmentations", action="store_true", help="the costs of augmentations")
    parser.add_argument("--costs", action="store_true", help="the costs of all methods")
    parser.add_argument("--grid", action="store_true", help="a small grid instead, end to end")
    parser.add_argument("--epochs", type=positive, default=3, help="of the small grid")
    parser.add_argument("overrides", nargs="*", help="configuration overrides, after --")
    arguments = parser.parse_args()
    quiet_lightning()
    logging.getLogger("lightning").setLevel(logging.WARNING)
    plan = configuration("none", "small", arguments.overrides)
    device, precision = device_of(plan), plan.student.trainer.precision
    peak = Peak(device, precision)
    print(
        f"{device_name(device)}, torch {torch.__version__}, {precision}, "
        f"matrix products at {peak.rate / 1e9:,.0f} GFLOP/s"
    )
    if arguments.grid:
        measure_grid(arguments.overrides, arguments.epochs)
        return
    print(f"images per second, medians of {arguments.repetitions} rounds")
    if arguments.augmentations:
        print(row("views", "student", "live", "step"))
        for student in arguments.students:
            compare_augmentations(student, arguments.repetitions, arguments.overrides)
        return
    if arguments.costs:
        print("time of a step, relative to none")
        print(row("method", "student", "remembered", "live"))
        for student in arguments.students:
            compare_costs(student, arguments.repetitions, arguments.overrides)
        return
    heads = ["bare", "live", "live/bare", "remembered", "rem./none", "of peak", "memory"]
    heads += ["plain", "live/plain", "rem./plain"] if arguments.plain else []
    print(row("method", "student", *heads))
    for student in arguments.students:
        compare(student, arguments, peak)


if __name__ == "__main__":
    main()
