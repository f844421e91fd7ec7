"""Draw the import matrix of the packages for docs/architecture.md.

    python scripts/draw_imports.py docs/architecture.png

A row imports from the columns; numbers count modules. Packages are in order of their layers, so
that imports which point downwards are all on one side of the diagonal.
"""

import ast
import sys
from pathlib import Path

import numpy as np
import seaborn
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

SOURCE = Path(__file__).resolve().parents[1] / "src" / "kd_lightning"
ORDER = (
    "cli", "api", "workflows", "engine", "distill", "inference", "reports", "storage", "config",
    "losses", "data", "models", "errors, files, ...",
)  # fmt: skip


def package(module: str) -> str:
    """The row of a module: its package, or the last one for modules at the top level."""
    first = f"{module}.".split(".")[1]
    return {"__main__": "cli"}.get(first, first if first in ORDER else ORDER[-1])


def imported(path: Path) -> set[str]:
    """The packages that a module imports from."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    modules = [
        f"{node.module}.{alias.name}"
        for node in nodes
        for alias in node.names
        if (node.module or "").startswith("kd_lightning")
    ]
    return {package(module) for module in modules}


def count_imports() -> np.ndarray:
    """[row, column]: modules of the one package that import from the other."""
    counts = np.zeros((len(ORDER), len(ORDER)), int)
    for path in SOURCE.rglob("*.py"):
        module = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
        for other in imported(path):
            counts[ORDER.index(package(module)), ORDER.index(other)] += 1
    return counts


def draw(counts: np.ndarray) -> Figure:
    """A matrix: everything right of the diagonal is an import that points downwards."""
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    seaborn.heatmap(
        counts, ax=axes, mask=(counts == 0), annot=True, fmt="d", cmap="Blues", cbar=False,
        vmin=-4, square=True, linewidths=0.5, linecolor="0.9", xticklabels=ORDER, yticklabels=ORDER,
    )  # fmt: skip
    for number in range(len(ORDER)):
        axes.add_patch(Rectangle((number, number), 1, 1, fill=False, edgecolor="0.5"))
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", rotation=45, length=0)
    axes.tick_params(axis="y", length=0)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("left")
    return figure


if __name__ == "__main__":
    draw(count_imports()).savefig(sys.argv[1] if len(sys.argv) > 1 else "imports.png", dpi=110)
