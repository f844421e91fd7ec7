"""Figures: bounded size for any number of classes, literal names, never fatal."""

import io
import logging
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from reported_runs import write_run

from kd_lightning import api
from kd_lightning.config.naming import config_key
from kd_lightning.data import ImageDataModule, Images
from kd_lightning.engine.callbacks.pictures import LARGEST_VIEW, page_of_views
from kd_lightning.engine.fitting import _columns
from kd_lightning.reports import plots
from kd_lightning.reports.documents import write_report
from kd_lightning.reports.runs import python_text, read_numbers
from kd_lightning.storage.run_directory import RunDirectory

NAMES = [
    "$_$", "a_b^c", "\\frac{", "$$", r"\$", "$", "x" * 200, "😀👩‍👩‍👧",
    "שלום עולם", "日本語", "12", "-1e3",
    "_hidden", "a\nb\tc", "\udce9t\udce9", "%&~#{}", "", " ", "\x1b[2J", "e\u0301" * 50,
]  # fmt: skip


def counts_of(classes, seed=0):
    return np.random.default_rng(seed).integers(0, 30, (classes, classes))


def texts(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


def assert_literal(figure):
    """Nothing is rendered as a formula, and no warnings are raised."""
    from matplotlib.text import Text

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = plots.pixels(figure)
    for text in figure.findobj(Text):
        _, formula = text._preprocess_math(text.get_text())
        assert not formula, text.get_text()
    return drawn


@pytest.mark.parametrize("classes", [2, 20, 21, 1000])
def test_confusion_matrix_figure_has_bounded_size(monkeypatch, classes):
    from matplotlib.backends.backend_agg import RendererAgg

    made = []
    init = RendererAgg.__init__
    monkeypatch.setattr(
        RendererAgg, "__init__", lambda self, *size: made.append(size) or init(self, *size)
    )
    figure = plots.confusion_matrix(
        counts_of(classes), [f"a class of number {number}" for number in range(classes)]
    )
    width, height = figure.get_size_inches()
    assert width * height <= plots.LARGEST
    drawn = plots.pixels(figure)
    assert drawn.size <= 3 * plots.LARGEST * 100**2
    assert drawn.std() > 10  # not empty
    # The number of drawn elements is bounded, too, which limits time and memory.
    assert len(figure.findobj()) < 5000
    assert 1 <= len(made) <= 4  # one canvas per label would need gigabytes


def test_confusion_matrix_of_few_classes():
    counts = np.array([[8, 2], [1, 9]])
    shown = texts(plots.confusion_matrix(counts, ["cat", "dog"]))
    assert {"cat", "dog", "80", "20", "10", "90"} <= set(shown)


def test_confusion_matrix_of_many_classes_lists_top_confusions():
    counts = np.diag(np.full(150, 10))
    counts[3, 7], counts[100, 2], counts[140, 141] = 9, 5, 30
    figure = plots.confusion_matrix(counts, [f"name{number}" for number in range(150)])
    shown = [text.replace("\u200e", "") for text in texts(figure)]
    pairs = list(dict.fromkeys(text for text in shown if "name" in text))
    assert pairs == ["name140 → name141", "name3 → name7", "name100 → name2"]
    assert {"30 (75 %)", "9 (47 %)", "5 (33 %)"} <= set(shown)


@pytest.mark.parametrize("classes", [100, 600])
def test_overview_counts_every_image(classes):
    """Each row sums to 100 %, with one or several classes per square."""
    counts = counts_of(classes)
    figure = plots.confusion_matrix(counts, [str(number) for number in range(classes)])
    (image,) = figure.axes[0].images
    share = np.asarray(image.get_array())
    assert share.shape[0] <= plots.MOST_SQUARES
    np.testing.assert_allclose(share.sum(axis=1), 100)
    group = -(-classes // share.shape[0])
    expected = counts[:group, :group].sum() / counts[:group].sum()
    assert share[0, 0] == pytest.approx(100 * expected)


@pytest.mark.parametrize("classes", [5, 30])
def test_empty_and_perfect_confusion_matrix(classes):
    names = [str(number) for number in range(classes)]
    for counts in (np.zeros((classes, classes), np.int64), np.eye(classes, dtype=np.int64)):
        assert_literal(plots.confusion_matrix(counts, names))


@pytest.mark.parametrize("classes", [20, 60])
def test_class_names_are_literal(classes):
    names = (NAMES * classes)[:classes]
    figure = plots.confusion_matrix(counts_of(classes), names, "$_$ \\frac{ " * 30)
    assert_literal(figure)
    assert max(len(text) for text in texts(figure)) < 100


@python_text
@pytest.mark.parametrize("names", [NAMES[first::4] for first in range(4)], ids=range(4))
def test_method_and_student_names_are_literal(names):
    cells = pd.DataFrame(
        [
            {
                "label": label, "student": student, "n": 2, "parameters": 1e6 * number,
                "test": 0.8, "test_std": 0.01, "gain": gain, "gain_high": gain + 0.05,
            }
            for number, student in enumerate([*names, "other"], start=1)
            for label, gain in [("none", np.nan), *((name, 0.1) for name in names)]
        ]
    )  # fmt: skip
    runs = pd.DataFrame(
        {"teacher": names[:1], "teacher_test_accuracy": 0.9, "teacher_parameters": 4e6}
    )
    histories = pd.DataFrame(
        [
            {"label": name, "student": student, "seed": 0, "epoch": epoch, "val_accuracy": 0.5}
            for name in names
            for student in names
            for epoch in (1, 2)
        ]
    )
    for figure in (
        plots.accuracy_by_size(cells, runs),
        plots.gain_by_method(cells[cells["student"] == names[0]]),
        plots.learning_curves(histories),
    ):
        assert_literal(figure)
        labels = [
            text.get_text().strip()
            for axes in figure.axes if axes.get_legend()
            for text in axes.get_legend().get_texts()
        ] or [text.get_text().strip() for text in figure.axes[0].get_yticklabels()]  # fmt: skip
        for name in filter(str.strip, names):  # Matplotlib omits names that begin with _
            start = plots.text(name).strip()[:3]
            assert any(label.startswith(start) for label in labels), name


def cells_of(methods, students, gain=0.01):
    """Two seeds of every method and student, all with a gain of one point, or without."""
    names = ["none", *(f"m{n}" for n in range(methods))]
    rows = [
        {
            "label": name, "student": f"s{n}", "n": 2, "parameters": 1e6 * (n + 1), "test": 0.8,
            "test_std": 0.01, "gain": np.nan if name == "none" else gain,
            "gain_high": np.nan if name == "none" else gain and gain + 0.002,
        }
        for name in names for n in range(students)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("methods", "students"), [(1, 1), (30, 2), (20, 4), (2, 100)])
def test_gains_of_any_number_of_methods(methods, students):
    figure = plots.gain_by_method(cells_of(methods, students))
    width, height = figure.get_size_inches()
    assert width * height <= plots.LARGEST
    panels = [axes for axes in figure.axes if axes.axison]
    assert len(panels) == min(students, plots.MOST_PANELS)
    names = {text.get_text() for text in panels[0].get_yticklabels()}
    assert names == {f"m{n}" for n in range(methods)}
    for axes in panels:
        values = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
        assert values == pytest.approx([1.0] * methods)


def test_accuracies_are_shown_where_there_is_no_baseline():
    figure = plots.gain_by_method(cells_of(2, 1, np.nan))
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert sorted(names) == ["m0", "m1", "none"]


@pytest.mark.parametrize("number", [1, 2, 4, 30])
def test_methods_are_drawn_beside_the_true_size(number):
    places = plots.beside(number)
    assert len(set(places)) == number
    assert np.sqrt(places[0] * places[-1]) == pytest.approx(1)
    assert places[-1] / places[0] < 1.11


def test_methods_have_colours_of_their_own():
    colours = plots.colours([f"m{n}" for n in range(20)])
    assert len({str(colour) for colour in colours.values()}) == len(colours)


def test_figure_of_many_students_has_bounded_size():
    histories = pd.DataFrame(
        {"label": "none", "student": [f"s{n}" for n in range(100)], "epoch": 1, "val_accuracy": 0.5}
    )
    figure = plots.learning_curves(histories)
    width, height = figure.get_size_inches()
    assert width * height <= plots.LARGEST
    assert "88 more students are not shown" in texts(figure)


# --- figures never fail a run -------------------------------------------------------------------


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def test_failed_figure_causes_a_warning(train, monkeypatch):
    views = "kd_lightning.engine.callbacks.pictures.page_of_views"
    monkeypatch.setattr(plots, "confusion_matrix", failing(ValueError("mathtext")))
    monkeypatch.setattr(views, failing(MemoryError()))
    done = train("method=none", "trainer.max_epochs=1", "pictures=true")
    assert done.code == 0, done.err
    assert done.metrics["status"] == "finished"
    said = [line for line in done.err.splitlines() if "is omitted" in line]
    assert "training views" in said[0]
    assert "confusion" in said[-1]
    assert "Traceback" not in done.err


@pytest.mark.parametrize("error", [MemoryError(), ValueError("mathtext"), OSError("no font")])
def test_any_error_of_a_figure_is_a_warning(caplog, error):
    with caplog.at_level(logging.WARNING), plots.optional("the figure"):
        failing(error)()
    assert f"the figure is omitted: {type(error).__name__}: {error}" in caplog.text


def test_figures_can_be_disabled(train, monkeypatch):
    disabled = failing(AssertionError("a picture was drawn"))
    monkeypatch.setattr(plots, "confusion_matrix", disabled)
    monkeypatch.setattr("kd_lightning.engine.callbacks.pictures.page_of_views", disabled)
    done = train("method=none", "trainer.max_epochs=1", "pictures=false")
    assert done.code == 0
    assert "omitted" not in done.err
    # Same name and key of the run.
    with_, without = (api.compose(f"pictures={value}") for value in ("true", "false"))
    assert (with_["name"], with_["setting"]) == (without["name"], without["setting"])
    assert config_key(with_) == config_key(without)


def test_pictures_must_be_a_boolean(train):
    done = train("pictures=often")
    assert done.code == 2
    assert "pictures must be true or false" in done.err


def test_report_without_a_failed_figure(tmp_path, monkeypatch, caplog):
    write_run(tmp_path, "none", "small", 0, 0.8)

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(plots, "confusion_matrix", fail)
    with caplog.at_level(logging.WARNING):
        write_report([tmp_path], tmp_path / "report", page=True)
    assert "'confusion'" in caplog.text
    assert not (tmp_path / "report" / "confusion.png").exists()
    assert (tmp_path / "report" / "curves.png").exists()
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<img") == 3


@pytest.mark.parametrize("size", [8, 128, 400])
def test_grid_of_views_has_bounded_size(size):
    class Data(ImageDataModule):
        classes = ("a", "b")

        def load(self):
            pixels = torch.randint(0, 256, (40, size, size, 3), dtype=torch.uint8)
            return Images(pixels, torch.arange(40) % 2, 30)

    data = Data(name="own", image_size=size, batch_size=8)
    data.setup()
    page = page_of_views(data)
    shown = min(size, LARGEST_VIEW)
    assert page.shape == (3, 8 * (shown + 2) + 2, 8 * (shown + 2) + 2)
    assert -0.01 <= page.min() < page.max() <= 1.01


# --- confusion.csv --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["crane", "crane", "crane (class 1)", "crane"],
        ["a,b", 'a"b', "a\nb", "a\r\nb"],
        ["0", "1", "00", "-1"],
        ["\udce9", "é", "", "😀"],
    ],
)
def test_confusion_csv_has_one_column_per_class(tmp_path, names):
    counts = counts_of(4)
    columns = _columns(names)
    assert len(set(columns)) == 4
    rows = [dict(zip(columns, row, strict=True)) for row in counts.tolist()]
    RunDirectory(tmp_path).write_table("confusion", rows)
    table = read_numbers(tmp_path / "confusion.csv")
    assert np.array_equal(table.to_numpy(), counts)


def test_common_class_names_are_unchanged_columns():
    assert _columns(["cat", "dog", "été"]) == ["cat", "dog", "été"]


def test_run_with_unusual_class_names(train, folder):
    for part in ("train", "test"):
        (folder / part / "class0").rename(folder / part / "$_$")
        (folder / part / "class1").rename(folder / part / "a,b\n\\frac{")
    done = train("method=none", "trainer.max_epochs=1", "pictures=true")
    assert done.code == 0, done.err
    assert "omitted" not in done.err  # no figure failed
    table = read_numbers(done.runs[0] / "confusion.csv")
    assert list(table.columns) == ["$_$", r"a,b\n\frac{", "class2"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(done.runs[0]))
    events.Reload()
    shown = Image.open(io.BytesIO(events.Images("test/confusion")[-1].encoded_image_string))
    assert torch.from_numpy(np.array(shown)).float().std() > 10


def test_colour_of_a_method_does_not_depend_on_the_others_shown():
    some, all_of_them = (
        plots.colours(["dkd", "crd"]),
        plots.colours(["none", "crd", "logit", "dkd"]),
    )
    assert {name: all_of_them[name] for name in ("dkd", "crd")} == {
        name: some[name] for name in ("dkd", "crd")
    }
    assert len(set(map(str, all_of_them.values()))) == len(all_of_them)
