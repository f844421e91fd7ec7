"""Report files: `results.csv`, `results.md`, figures, and a single HTML page."""

import base64
import html
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from kd_lightning.files import replacing, tidy, write_text
from kd_lightning.reports import plots
from kd_lightning.reports.differences import IMAGES, TEACHER
from kd_lightning.reports.quality_plots import accuracy_by_cost, reliability_diagram
from kd_lightning.reports.runs import (
    python_text,
    read_histories,
    read_numbers,
    read_runs,
    setting_columns,
)
from kd_lightning.reports.statistics import AXES, CONFIDENCE, Group, check_paired, groups, summarise
from kd_lightning.reports.tables import quality_and_cost
from kd_lightning.results import DASH, FIGURE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPLANATIONS = ("differences", "attention", "cka")
"""Pictures of `scripts/explain.py` in the folder `explanation` of a run."""

FIGURES = ("accuracy", "methods", "cost", "curves", "confusion", "reliability", *EXPLANATIONS)
MOST_DRAWN = 12  # settings with figures; each takes a second or two
CHARACTERS = 11  # of a title, per inch of a figure's width
_OVERVIEW = "Test accuracy of the last epoch in per cent, mean ± standard deviation (runs)."
_GAIN = (
    "The gain is the difference in test accuracy to none, the same student and seed without a "
    f"teacher, with its {CONFIDENCE:.0%} interval (Student's t over pairs of seeds)."
)
_QUALITY = (
    "Calibration and cost. Negative log-likelihood (NLL) in nats and calibration error in per cent "
    "on test images, multiply-accumulates (MACs) per image, median latencies in milliseconds for 1 "
    "image with one thread and for 64 images with all threads; see docs/quality.md."
)


@python_text
def write_report(
    sources: Iterable[str | Path],
    out: Path,
    page: bool = False,
    draw_figures: bool = True,
    baseline: str | Path | None = None,
) -> pd.DataFrame:
    """Write `results.csv`, `results.md` and their figures, if there is any run.

    Args:
        sources: see `runs.read_runs`.
        out: output folder.
        page: also write `report.html`, with everything in one file.
        draw_figures: whether to draw figures; if not, existing ones are used.
        baseline: see `runs.read_runs`.

    Returns:
        One row per run.
    """
    runs = read_runs(sources, baseline)
    if runs.empty:
        return runs  # an earlier report is kept
    if baseline is not None:
        check_paired(runs, baseline)
    named = groups(runs)
    files = _file_names(named)
    texts, pages = ["# Results\n"], []
    if len(named) > 1:
        texts.append("".join(f"- {_text(group.title)}\n" for group in named))
        pages.append(_html_contents(named))
    if len(named) > MOST_DRAWN:
        note = f"Only the first {MOST_DRAWN} of {len(named)} settings have figures."
        texts.append(f"{note}\n")
        pages.append(f"<p>{note}</p>")
    for number, group in enumerate(named):
        cells = summarise(group.runs)
        pictures = {name: out / f"{files[number]}{name}.png" for name in FIGURES}
        drawn = draw(group.runs, cells, group.words) if draw_figures and number < MOST_DRAWN else {}
        for name, content in drawn.items():
            with replacing(pictures[name]) as partial:
                partial.write_bytes(content)
        if draw_figures:
            pictures = {name: pictures[name] for name in drawn}
        else:
            pictures = {name: path for name, path in pictures.items() if path.exists()}
        texts.append(
            markdown(group.title, group.runs, cells, {n: p.name for n, p in pictures.items()})
        )
        if page:
            pages.append(_html_section(number, group, cells, drawn))
    if listed := ", ".join(runs[runs["status"] == "unreadable"]["folder"]):
        texts.append(f"Not readable as runs: {_text(listed)}\n")
        pages.append(f"<p>Not readable as runs: {html.escape(listed)}</p>")
    documents = {
        # Whole numbers stay whole where an unfinished run has none.
        "results.csv": runs.convert_dtypes().to_csv(index=False, lineterminator="\n"),
        "results.md": "\n".join(texts),
        **({"report.html": _PAGE.format(body="\n".join(pages))} if page else {}),
    }
    for name, text in documents.items():
        # Names of folders need not be UTF-8.
        write_text(out / name, text.encode("utf-8", "replace").decode("utf-8"))
    return runs


def _file_names(named: list[Group]) -> list[str]:
    """File name prefixes of the figures of each group."""
    if len(named) < 2:
        return [""] * len(named)
    names: list[str] = []
    for group in named:
        name = tidy("-".join(part for part in (group.setting, group.words) if part))[:100]
        names.append(name if name not in names else f"{name}-{len(names)}")
    return [f"{name}-" for name in names]


def draw(runs: pd.DataFrame, cells: pd.DataFrame, words: str = "") -> dict[str, bytes]:
    """Draw the figures of one setting, as far as there is data: name to PNG content.

    Args:
        runs: runs of the setting.
        cells: from `statistics.summarise`.
        words: distinguishing settings, used as title of every figure.
    """
    finished = runs[runs["status"] == "finished"]
    if finished.empty:
        return {}
    histories = read_histories(finished)
    figures: dict[str, Callable[[], Figure | None]] = {
        "accuracy": lambda: plots.accuracy_by_size(cells, finished),
        "methods": lambda: plots.gain_by_method(cells),
        "cost": lambda: accuracy_by_cost(cells, finished),
        "curves": lambda: plots.learning_curves(histories) if len(histories) else None,
        "confusion": lambda: _confusion_of_best(finished),
        "reliability": lambda: _reliability_of_best(finished),
    }
    pictures = {}
    for name, make in figures.items():
        with plots.optional(f"the figure '{name}' of the report"):
            figure = make()
            if figure is not None:
                if words:
                    width = round(CHARACTERS * figure.get_figwidth())
                    title = textwrap.fill(plots.text(words, 400), width)
                    figure.suptitle(title, fontsize="medium")
                pictures[name] = plots.png(figure)
    return pictures | _explanation_of_best(finished)


def _best(finished: pd.DataFrame) -> "pd.Series[Any]":
    return finished.loc[finished["val_accuracy"].astype(float).idxmax()]


def _explanation_of_best(finished: pd.DataFrame) -> dict[str, bytes]:
    """The pictures of the best run that has any."""
    folders = [Path(str(folder)) / "explanation" for folder in finished["folder"]]
    explained = finished[[folder.is_dir() for folder in folders]]
    if explained.empty:
        return {}
    paths = [
        Path(str(_best(explained)["folder"])) / "explanation" / f"{n}.png" for n in EXPLANATIONS
    ]
    found = ((path.stem, path.read_bytes()) for path in paths if path.exists())
    return {name: picture for name, picture in found if picture.startswith(b"\x89PNG")}


def _reliability_of_best(finished: pd.DataFrame) -> "Figure | None":
    best = _best(finished)
    try:
        bins = pd.read_csv(Path(str(best["folder"])) / "reliability.csv")
    except (OSError, ValueError):  # a run of an older version
        return None
    return reliability_diagram(bins, f"{best['name']}, the best on validation")


def _confusion_of_best(finished: pd.DataFrame) -> "Figure | None":
    best = _best(finished)
    counts = read_numbers(Path(str(best["folder"])) / "confusion.csv")
    if counts is None or len(counts) != len(counts.columns):
        return None
    title = f"{best['name']}, the best on validation"
    return plots.confusion_matrix(counts.to_numpy(), list(counts.columns), title)


def markdown(title: str, runs: pd.DataFrame, cells: pd.DataFrame, pictures: dict[str, str]) -> str:
    """The Markdown section of one setting: facts, overview, details, failed runs."""
    lines = [f"## {_text(title)}\n", f"{_text(facts(runs))}\n"]
    lines += [f"{_OVERVIEW}\n", _pipe(overview(cells, runs)), ""]
    lines += [f"Every cell. {_GAIN}\n", _pipe(details(cells)), ""]
    quality = quality_and_cost(cells, runs)
    if quality is not None:
        lines += [f"{_QUALITY}\n", _pipe(quality), ""]
    lines += [f"![{name}]({file})" for name, file in pictures.items()]
    lines += [
        f"- **{_text(str(run.name))}** failed: {_text(str(run.error))}"
        for run in _failed(runs).itertuples()
    ]
    return "\n".join(lines) + "\n"


def facts(runs: pd.DataFrame) -> str:
    """Summarise the common settings of all runs of a setting, in a sentence or two."""
    done = runs[runs["status"] == "finished"].replace({"git_commit": {"": "unknown"}})
    if done.empty:
        return "No run is finished yet."

    def values(column: str) -> str:
        return ", ".join(str(value) for value in done[column].dropna().unique())

    epochs = ", ".join(f"{number:.0f}" for number in sorted(done["epochs"].dropna().unique()))
    told = [
        f"{key} {values(key)}"
        for key in setting_columns(done)
        if values(key) and not key.startswith((*AXES, "trainer.max_epochs"))
    ]
    contents = {IMAGES: "images_sha256", TEACHER: "teacher_sha256"}
    told += [
        f"{name} {', '.join(str(value)[:8] for value in done[column].dropna().unique())}"
        for name, column in contents.items()
        if done[column].notna().any()
    ]
    settings = "".join(f", {words}" for words in told)
    text = (
        f"Data {values('data')}, {epochs or 'unknown'} epoch{'' if epochs == '1' else 's'}"
        f"{settings}, {values('precision')} on {values('device')}, torch {values('torch')}, "
        f"commit {values('git_commit') or 'unknown'}."
    )
    teacher = done.dropna(subset="teacher_test_accuracy")
    if len(teacher):
        text += (
            f" Teacher {teacher.iloc[0]['teacher']}: "
            f"{_range(teacher, 'teacher_parameters')} parameters, "
            f"{_range(teacher, 'teacher_val_accuracy')} % on validation, "
            f"{_range(teacher, 'teacher_test_accuracy')} % on test."
        )
    return text


def _range(runs: pd.DataFrame, name: str) -> str:
    """The value of a figure, or its range: every run may have a teacher of its own."""
    ends = (runs[name].astype(float).min(), runs[name].astype(float).max())
    return " to ".join(dict.fromkeys(map(FIGURE[name].show, ends)))


def overview(cells: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Table of methods by students: test accuracy in per cent."""
    students = list(dict.fromkeys(cells.sort_values("parameters", na_position="last")["student"]))
    table: dict[str, dict[str, str]] = {}
    teachers = runs.dropna(subset="teacher_test_accuracy")
    if len(teachers):
        accuracies = teachers["teacher_test_accuracy"].astype(float)
        own = accuracies.groupby(teachers["student"]).median()  # some follow the student
        table[f"teacher {teachers.iloc[0]['teacher']}"] = {
            student: _percent(own.get(student, accuracies.median())) for student in students
        }
    for cell in cells.itertuples():
        table.setdefault(str(cell.label), dict.fromkeys(students, DASH))[str(cell.student)] = (
            _short(cell)
        )
    frame = pd.DataFrame.from_dict(table, orient="index", columns=students)
    return frame.rename_axis("method").reset_index()


def details(cells: pd.DataFrame) -> pd.DataFrame:
    """Table of all cells, formatted for display."""
    rows = list(cells.itertuples())
    return pd.DataFrame(
        {
            "student": cells["student"],
            "method": cells["label"],
            "parameters": cells["parameters"].map(FIGURE["parameters"].show),
            "ratio": cells["compression_ratio"].map(FIGURE["compression_ratio"].show),
            "runs": [_runs(cell) for cell in rows],
            "validation": [_spread(c.val, c.val_std) for c in rows],
            "test": [_spread(c.test, c.test_std) for c in rows],
            "gain": [_gain(cell) for cell in rows],
            "gap closed": [
                DASH if pd.isna(v) else f"{round(100 * v)} %" for v in cells["gap_closed"]
            ],
            "agreement": cells["agreement"].map(FIGURE["agreement"].show),
            "seconds": cells["seconds"].map(FIGURE["train_seconds"].show),
        }
    )


def _short(cell: "pd.core.series.Series") -> str:
    text = _spread(cell.test, cell.test_std)
    return f"{text} ({_runs(cell)})" if cell.n or cell.failed or cell.unfinished else "missing"


def _runs(cell: "pd.core.series.Series") -> str:
    lacking = [
        f"{getattr(cell, what)} {what}"
        for what in ("failed", "unfinished", "missing")
        if getattr(cell, what)
    ]
    return ", ".join([str(cell.n), *lacking])


def _gain(cell: "pd.core.series.Series") -> str:
    if pd.isna(cell.gain):
        return DASH
    text = f"{100 * cell.gain:+.2f}"
    if not pd.isna(cell.gain_low):
        text += f" [{100 * cell.gain_low:+.2f}, {100 * cell.gain_high:+.2f}]"
    return text if cell.pairs == cell.n else f"{text} ({cell.pairs} of {cell.n} runs)"


def _spread(mean: float, deviation: float) -> str:
    if pd.isna(mean):
        return DASH
    return _percent(mean) + ("" if pd.isna(deviation) else f" ± {100 * deviation:.2f}")


def _percent(value: float) -> str:
    return FIGURE["test_accuracy"].show(value)


def _failed(runs: pd.DataFrame) -> pd.DataFrame:
    return runs.loc[runs["status"] == "failed", ["name", "error"]]


def _text(words: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return " ".join(words.split()).replace("|", "\\|")


def _pipe(table: pd.DataFrame) -> str:
    """Format a Markdown table."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(_text(str(cell)) for cell in row) + " |" for row in rows)


def _html_contents(named: list[Group]) -> str:
    links = [
        f'<li><a href="#setting-{number}">{html.escape(group.title)}</a></li>'
        for number, group in enumerate(named)
    ]
    return "<ul>" + "".join(links) + "</ul>"


def _html_section(
    number: int, group: Group, cells: pd.DataFrame, pictures: Mapping[str, bytes]
) -> str:
    parts = [
        f'<h2 id="setting-{number}">{html.escape(group.title)}</h2>',
        f"<p>{html.escape(facts(group.runs))}</p>",
        f"<p>{_OVERVIEW}</p>",
        _html_table(overview(cells, group.runs)),
        f"<p>{_GAIN}</p>",
        _html_table(details(cells)),
    ]
    quality = quality_and_cost(cells, group.runs)
    if quality is not None:
        parts += [f"<p>{_QUALITY}</p>", _html_table(quality)]
    for name, picture in pictures.items():
        data = base64.b64encode(picture).decode()
        parts.append(f'<img alt="{name}" src="data:image/png;base64,{data}">')
    for run in _failed(group.runs).itertuples():
        parts.append(
            f"<p><b>{html.escape(str(run.name))}</b> failed: {html.escape(str(run.error))}</p>"
        )
    return "\n".join(parts)


def _html_table(table: pd.DataFrame) -> str:
    with pd.option_context("display.max_colwidth", None):
        return f'<div class="table">{table.to_html(index=False, border=0)}</div>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Results</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 14px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 1em; }}
table {{ border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3em .7em; text-align: right; white-space: nowrap; }}
tr {{ border-bottom: 1px solid #8885; }}
th:first-child, td:first-child {{ text-align: left; }}
.table {{ overflow-x: auto; }}
h2, p, li {{ overflow-wrap: anywhere; }}
img {{ max-width: 100%; margin: 1em 0; display: block; }}
@media print {{
  body {{ max-width: none; margin: 0; padding: 0; font-size: 9px; }}
  h2, p {{ break-after: avoid; }}
  img, tr {{ break-inside: avoid; }}
  img {{ max-height: 11cm; }}
  .table {{ overflow: visible; }}
}}
</style></head><body><h1>Results</h1>
{body}
</body></html>
"""
