"""Tables of calibration and cost, formatted for display."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from kd_lightning.results import BATCHES, DASH, FIGURE

SHOWN = {
    "NLL": ("test_nll", "teacher_test_nll"),
    "calibration error": ("test_ece", "teacher_test_ece"),
    "fitted temperature": ("temperature", None),
    "error with it": ("test_ece_calibrated", None),
    "MACs": ("macs", "teacher_macs"),
    "weights": ("file_bytes", "teacher_bytes"),
    "ms for 1": ("latency_1_one_thread_p50", "teacher_latency_1_one_thread_p50"),
    "ms for 64": ("latency_64_all_threads_p50", "teacher_latency_64_all_threads_p50"),
}
"""Columns of `quality_and_cost`: the figures of student and teacher."""


def quality_and_cost(cells: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame | None:
    """Table of calibration and cost of the teacher and all cells; columns without any value are
    left out. None if nothing is known, as of runs of older versions.

    Args:
        cells: from `statistics.summarise`, of one setting.
        runs: the runs of the setting, for the teacher.
    """
    known = {title: names for title, names in SHOWN.items() if cells[names[0]].notna().any()}
    if not known:
        return None
    table = pd.DataFrame({"student": cells["student"], "method": cells["label"]})
    for title, (name, _) in known.items():
        table[title] = cells[name].map(FIGURE[name].show)
    table = table[cells["n"] > 0]
    taught = runs.dropna(subset="teacher_test_accuracy")
    if len(taught):
        row = {"student": DASH, "method": f"teacher {taught.iloc[0]['teacher']}"}
        for title, (_, of_teacher) in known.items():
            row[title] = DASH
            if of_teacher is not None:
                values = taught[of_teacher].dropna().astype(float)
                row[title] = FIGURE[of_teacher].show(values.median() if len(values) else None)
        table = pd.concat([pd.DataFrame([row]), table], ignore_index=True)
    return table


def cost_table(figures: Mapping[str, Any]) -> pd.DataFrame:
    """Table of the costs of one student and its teacher.

    Args:
        figures: of `metrics.json`; missing ones are shown as a dash.
    """
    columns = {"": "student"}
    if "teacher_macs" in figures:
        columns["teacher_"] = "teacher"
    rows = [("multiply-accumulates", "macs"), ("weights", "bytes")]
    for batch in BATCHES:
        images = "1 image" if batch == 1 else f"{batch} images"
        for how in ("one_thread", "all_threads"):
            for part in ("p50", "p95"):
                label = f"{images}, {how.replace('_', ' ')}, {part} (ms)"
                rows.append((label, f"latency_{batch}_{how}_{part}"))
        rows.append((f"{images}, peak memory", f"memory_{batch}"))
    table = pd.DataFrame({"cost": [label for label, _ in rows]})
    for prefix, title in columns.items():
        names = [f"{prefix}{name}" for _, name in rows]
        names = ["file_bytes" if name == "bytes" else name for name in names]
        table[title] = [FIGURE[name].show(figures.get(name)) for name in names]
    return table
