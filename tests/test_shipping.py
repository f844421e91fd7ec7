"""From class folders to predictions of an exported file: each step one documented command."""

import contextlib
import csv
import functools
import json
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import REPOSITORY
from photograph_folder import CLASSES
from PIL import Image

from kd_lightning import api
from kd_lightning.errors import InputError, RunError
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows import export as exporting
from kd_lightning.workflows.jobs import prepare_again


def test_a_strangers_path(distilled, photographs, script, quick):
    code, said, _ = script("export.py", distilled, "--to", "onnx", "--int8")
    assert code == 0
    assert "120 test images" in said
    file = distilled / "exported" / "student-int8.onnx"
    assert file.exists()
    code, table, _ = script("predict.py", file, photographs / "test")
    assert code == 0
    rows = list(csv.DictReader(table.splitlines()))
    assert len(rows) == 120
    student = api.load_student(distilled)
    expected = student.predict([row["file"] for row in rows])
    same = np.mean([row["class"] == name for row, name in zip(rows, expected, strict=True)])
    assert same >= 0.99
    right = np.mean([row["class"] == Path(row["file"]).parent.name for row in rows])
    assert right > 0.95


# --- export ---------------------------------------------------------------------------------------


def test_exported_files_agree_with_the_student(distilled, exported, exported_pt2):
    pixels = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    student = api.load_student(distilled)
    expected = student.logits(pixels)
    model = student.model
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    torch.testing.assert_close(model(images).detach(), expected, atol=1e-5, rtol=1e-5)
    results = [exported, exported_pt2, api.export(distilled, "safetensors")]
    for result in results:
        assert result.images == 120
        assert result.agreement == 1
        assert result.difference < 1e-4
        assert result.accuracy == result.student_accuracy
        assert result.accuracy == RunDirectory(distilled).read_metrics()["test_accuracy"]
        loaded = api.load_student(result.path, trust=[result.path])
        assert loaded.description == student.description
        for count in (5, 1):  # the batch size is dynamic
            torch.testing.assert_close(
                loaded.logits(pixels[:count]), expected[:count], atol=1e-4, rtol=0
            )


def test_exported_files_describe_themselves(exported, distilled):
    model = onnx.load(exported.path)
    known = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert known["class_names"] == sorted(CLASSES)
    assert (known["image_size"], known["mean"], known["resize"]) == (16, [0.5] * 3, "squash")
    assert (
        known["temperature"] == json.loads((distilled / "metrics.json").read_text())["temperature"]
    )
    (pixels,) = model.graph.input
    assert pixels.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert str(REPOSITORY) not in str(model)  # no paths of this machine


def test_temperature_and_resizing_of_the_run_are_exported(distilled, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.yaml", "student.safetensors"):
        (copy / name).write_bytes((distilled / name).read_bytes())
    metrics = json.loads((distilled / "metrics.json").read_text())
    (copy / "metrics.json").write_text(json.dumps({**metrics, "temperature": 2.0}))
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("resize: squash", "resize: crop"))
    pixels = np.zeros((2, 16, 16, 3), np.uint8)
    student = api.load_student(copy)
    torch.testing.assert_close(
        student.probabilities(pixels), (student.logits(pixels) / 2).softmax(1)
    )
    loaded = api.load_student(api.export(copy, "safetensors").path)
    assert loaded.description == student.description
    assert loaded.description.resize == "crop"
    torch.testing.assert_close(loaded.probabilities(pixels), student.probabilities(pixels))


@pytest.fixture
def quick(exported, exported_pt2, monkeypatch):
    """Write a copy instead of exporting again, which takes seconds."""
    for file in (exported.path, exported_pt2.path):
        copy = functools.partial(shutil.copyfile, file)
        monkeypatch.setattr(
            exporting.exported,
            f"write_{file.suffix[1:]}",
            lambda program, description, path, copy=copy: copy(path),
        )


def distort(monkeypatch, reader, change):
    """Make the exported student compute something else."""
    read = getattr(exporting.exported, reader)

    def distorted(path):
        run, description = read(path)
        return lambda pixels: change(run(pixels)), description

    monkeypatch.setattr(exporting.exported, reader, distorted)


def test_quantization_is_deterministic_and_leaves_the_pixels_alone(distilled, quick, tmp_path):
    first, second = (
        api.export(distilled, int8=True, out=tmp_path / f"{number}.onnx").path for number in (1, 2)
    )
    assert first.read_bytes() == second.read_bytes()
    graph = onnx.load(first).graph
    kinds = [node.op_type for node in graph.node]
    # Integers go in; the first rounding is after the normalisation.
    assert kinds.index("QuantizeLinear") > kinds.index("Transpose")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name: value for name, value in stored.items() if name.endswith("_quantized")}
    weights = {name: value for name, value in weights.items() if value.dtype == np.int8}
    scales = [stored[name.replace("_quantized", "_scale")] for name in weights]
    assert sorted(len(scale) for scale in scales) == [3, 8, 16, 16]  # per output channel
    # Seven bits, so that sums do not saturate on processors without VNNI instructions.
    assert all(np.abs(value.astype(int)).max() <= 64 for value in weights.values())


def test_a_file_that_differs_is_not_written(distilled, quick, tmp_path, monkeypatch):
    distort(monkeypatch, "read_pt2", lambda logits: logits + 0.01)
    with pytest.raises(RunError, match=r"0\.01"):
        api.export(distilled, "pt2", out=tmp_path / "student.pt2")
    distort(monkeypatch, "read_pt2", lambda logits: logits * torch.nan)
    with pytest.raises(RunError, match="inf"):
        api.export(distilled, "pt2", out=tmp_path / "student.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_lossy_quantization_is_not_written(distilled, quick, tmp_path, monkeypatch, script):
    distort(monkeypatch, "read_onnx", lambda logits: -logits)
    file = tmp_path / "student.onnx"
    code, _, said = script("export.py", distilled, "--int8", "--out", file)
    assert code == 1
    assert "percentage points" in said
    assert list(tmp_path.iterdir()) == []
    assert script("export.py", distilled, "--int8", "--out", file, "--max-loss", "100")[0] == 0


@pytest.mark.parametrize(
    ("difference", "magnitude", "allowed"),
    [(0.9e-4, 0.1, True), (1.1e-4, 0.1, False), (0.9e-3, 10.0, True), (1.1e-3, 10.0, False)],
)
def test_exported_logits_may_differ_by_rounding_only(difference, magnitude, allowed):
    compared = exporting.Exported(Path("x"), 100, False, difference, magnitude, 1.0, 0.8, 0.8)
    with contextlib.nullcontext() if allowed else pytest.raises(RunError):
        exporting._judge(compared, None)


def test_calibration_images_are_spread_over_the_training_images(distilled, monkeypatch):
    monkeypatch.setattr(exporting, "CALIBRATION", 4)
    data = prepare_again(RunDirectory(distilled)).data
    (batch,) = exporting._calibration_batches(data)
    train = data.splits["train"]
    chosen = train[[0, len(train) // 4, len(train) // 2, 3 * len(train) // 4]]
    assert torch.equal(batch[0], data.pixel_source.pixels[chosen])
    assert torch.equal(batch[1], data.labels[chosen])


def test_exactly_the_allowed_loss_is_allowed():
    def judge(right):
        compared = exporting.Exported(Path("x"), 100, False, 1.0, 1.0, 0.9, right / 100, 83 / 100)
        exporting._judge(compared, 0.01)

    judge(82)
    with pytest.raises(RunError):
        judge(81)


def test_without_the_images_random_ones_are_compared(distilled, photographs, script):
    aside = photographs.rename(photographs.with_name("moved"))
    try:
        code, said, _ = script("export.py", distilled, "--to", "safetensors")
        assert code == 0
        assert "random images" in said
        assert "accuracy is not known" in said
        with pytest.raises(InputError, match="--data-root"):
            api.export(distilled, int8=True)
        assert api.export(distilled, "safetensors", data_root=str(aside)).accuracy is not None
    finally:
        aside.rename(photographs)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"to": "tflite"}, "tflite"),
        ({"to": "pt2", "int8": True}, "only available for ONNX"),
        ({"to": "onnx", "out": "student.pt2"}, "must end in .onnx"),
    ],
)
def test_invalid_exports_are_rejected(distilled, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        api.export(distilled, **arguments)


def test_missing_packages_are_named(distilled, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"onnxscript: pip install -e '\.\[export\]'"):
        api.export(distilled)


def test_documented_use_of_onnx_files(exported, photographs, tmp_path, monkeypatch, capsys):
    text = (REPOSITORY / "docs" / "shipping.md").read_text()
    begin = text.index("    import json, numpy")
    program = textwrap.dedent(text[begin : text.index("\n\n**Comparison", begin)])
    (tmp_path / "student.onnx").write_bytes(exported.path.read_bytes())
    Image.open(photographs / "test" / "bright" / "4.bmp").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    name, probability = capsys.readouterr().out.split()
    assert name == "bright"
    expected = api.load_student(exported.path).probabilities(["photo.jpg"]).max()
    assert float(probability) == pytest.approx(float(expected), abs=1e-5)


def test_no_student_of_a_run_is_overwritten(distilled, tmp_path):
    weights = (distilled / "student.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(distilled)
    for folder in (distilled, distilled / ".." / distilled.name, tmp_path / "link"):
        with pytest.raises(InputError):
            api.export(distilled, "safetensors", out=folder / "student.safetensors")
    with pytest.raises(InputError):
        api.export(distilled, "onnx", int8=True, max_loss=float("nan"))
    assert (distilled / "student.safetensors").read_bytes() == weights
