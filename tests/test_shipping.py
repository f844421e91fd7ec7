"""From class folders to predictions of an exported file: each step one documented command."""

import csv
import functools
import json
import runpy
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import REPOSITORY, TINY
from PIL import Image
from torch import nn

from kd_lightning import api
from kd_lightning.data.decoding import decode
from kd_lightning.errors import InputError, RunError
from kd_lightning.inference.exported import write_safetensors
from kd_lightning.models import ConvNet
from kd_lightning.workflows import export as exporting
from kd_lightning.workflows import predict as predicting

CLASSES = ("dark", "middle", "bright")
KINDS = (("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("P", "gif"), ("RGB", "bmp"), ("L", "jpg"))


def write_photographs(root: Path) -> Path:
    """Images of three classes and all kinds of size, mode and format."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 40)):
        for label, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                width, height = generator.integers(12, 40, 2)
                pixels = generator.integers(0, 50, (height, width, 3), dtype=np.uint8)
                mode, suffix = KINDS[number % len(KINDS)]
                image = Image.fromarray(pixels + np.uint8(100 * label)).convert(mode)
                image.save(folder / f"{number}.{suffix}")
    return root


def teacher_checkpoint(photographs: Path, path: Path) -> Path:
    """A stranger's checkpoint: a network trained by a plain loop."""
    torch.manual_seed(0)
    files = sorted((photographs / "train").glob("*/*"))
    pixels = torch.from_numpy(np.stack([decode(file, 16) for file in files]))
    images = (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    labels = torch.tensor([sorted(CLASSES).index(file.parent.name) for file in files])
    model = ConvNet([8, 16], 16, num_classes=3, image_size=16)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    torch.save({"state_dict": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("shipping")


@pytest.fixture(scope="module")
def photographs(place):
    return write_photographs(place / "photographs")


@pytest.fixture(scope="module")
def run(place, photographs):
    """The folder of a student distilled from the checkpoint."""
    metrics = api.run(
        *TINY, "method=logit", "data=folder", f"data.root={photographs}", "data.image_size=16",
        "data.padding=2", "data.batch_size=16", "trainer.max_epochs=10", "optimizer.lr=0.02",
        "student.model.channels=[8,16]", "student.model.hidden=16",
        f"teacher.checkpoint={teacher_checkpoint(photographs, place / 'teacher.pt')}",
        f"output_dir={place / 'outputs'}", f"data_dir={place / 'data'}",
    )  # fmt: skip
    assert metrics["teacher_test_accuracy"] > 0.95
    assert metrics["test_accuracy"] > 0.95
    return Path(metrics["folder"])


@pytest.fixture(scope="module")
def exported(run):
    """The student of the run as ONNX."""
    return api.export(run, "onnx")


@pytest.fixture(scope="module")
def exported_pt2(run):
    """The student of the run as a program of torch."""
    return api.export(run, "pt2")


@pytest.fixture
def script(monkeypatch, capsys):
    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(REPOSITORY / "scripts" / name), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_a_strangers_path(run, photographs, script, quick):
    code, said, _ = script("export.py", run, "--to", "onnx", "--int8")
    assert code == 0
    assert "120 test images" in said
    file = run / "exported" / "student-int8.onnx"
    assert file.exists()
    code, table, _ = script("predict.py", file, photographs / "test")
    assert code == 0
    rows = list(csv.DictReader(table.splitlines()))
    assert len(rows) == 120
    student = api.load_student(run)
    expected = student.predict([row["file"] for row in rows])
    same = np.mean([row["class"] == name for row, name in zip(rows, expected, strict=True)])
    assert same >= 0.99
    right = np.mean([row["class"] == Path(row["file"]).parent.name for row in rows])
    assert right > 0.95


# --- export ---------------------------------------------------------------------------------------


def test_exported_files_agree_with_the_student(run, exported, exported_pt2):
    pixels = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    student = api.load_student(run)
    expected = student.logits(pixels)
    model = student.model
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    torch.testing.assert_close(model(images).detach(), expected, atol=1e-5, rtol=1e-5)
    results = [exported, exported_pt2, api.export(run, "safetensors")]
    for result in results:
        assert result.images == 120
        assert result.agreement == 1
        assert result.difference < 1e-4
        assert result.accuracy == result.student_accuracy
        loaded = api.load_student(result.path, trust=[result.path])
        assert loaded.description == student.description
        for count in (5, 1):  # the batch size is dynamic
            torch.testing.assert_close(
                loaded.logits(pixels[:count]), expected[:count], atol=1e-4, rtol=0
            )


def test_exported_files_describe_themselves(exported, run):
    model = onnx.load(exported.path)
    known = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert known["class_names"] == sorted(CLASSES)
    assert (known["image_size"], known["mean"], known["resize"]) == (16, [0.5] * 3, "squash")
    assert known["temperature"] == json.loads((run / "metrics.json").read_text())["temperature"]
    (pixels,) = model.graph.input
    assert pixels.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert str(REPOSITORY) not in str(model)  # no paths of this machine


def test_temperature_and_resizing_of_the_run_are_exported(run, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.yaml", "student.safetensors"):
        (copy / name).write_bytes((run / name).read_bytes())
    metrics = json.loads((run / "metrics.json").read_text())
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


def test_quantization_is_deterministic_and_leaves_the_pixels_alone(run, quick, tmp_path):
    first, second = (
        api.export(run, int8=True, out=tmp_path / f"{number}.onnx").path for number in (1, 2)
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


def test_a_file_that_differs_is_not_written(run, quick, tmp_path, monkeypatch):
    distort(monkeypatch, "read_pt2", lambda logits: logits + 0.01)
    with pytest.raises(RunError, match=r"0\.01"):
        api.export(run, "pt2", out=tmp_path / "student.pt2")
    distort(monkeypatch, "read_pt2", lambda logits: logits * torch.nan)
    with pytest.raises(RunError, match="inf"):
        api.export(run, "pt2", out=tmp_path / "student.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_lossy_quantization_is_not_written(run, quick, tmp_path, monkeypatch, script):
    distort(monkeypatch, "read_onnx", lambda logits: -logits)
    file = tmp_path / "student.onnx"
    code, _, said = script("export.py", run, "--int8", "--out", file)
    assert code == 1
    assert "percentage points" in said
    assert list(tmp_path.iterdir()) == []
    assert script("export.py", run, "--int8", "--out", file, "--max-loss", "100")[0] == 0


def test_exactly_the_allowed_loss_is_allowed():
    def judge(right):
        compared = exporting.Exported(Path("x"), 100, False, 1.0, 1.0, 0.9, right / 100, 83 / 100)
        exporting._judge(compared, 0.01)

    judge(82)
    with pytest.raises(RunError):
        judge(81)


def test_without_the_images_random_ones_are_compared(run, photographs, script):
    aside = photographs.rename(photographs.with_name("moved"))
    try:
        code, said, _ = script("export.py", run, "--to", "safetensors")
        assert code == 0
        assert "random images" in said
        assert "accuracy is not known" in said
        with pytest.raises(InputError, match="--data-root"):
            api.export(run, int8=True)
        assert api.export(run, "safetensors", data_root=str(aside)).accuracy is not None
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
def test_invalid_exports_are_rejected(run, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        api.export(run, **arguments)


def test_missing_packages_are_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"onnxscript: pip install 'kd-lightning\[export\]'"):
        api.export(run)


def test_documented_use_of_onnx_files(exported, photographs, tmp_path, monkeypatch, capsys):
    text = (REPOSITORY / "docs" / "shipping.md").read_text()
    begin = text.index("    import json, numpy")
    program = textwrap.dedent(text[begin : text.index("\n\n**Comparison", begin)])
    (tmp_path / "student.onnx").write_bytes(exported.path.read_bytes())
    Image.open(photographs / "test" / "bright" / "4.bmp").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert capsys.readouterr().out == "bright\n"


# --- prediction -----------------------------------------------------------------------------------


def test_predict_keeps_the_order_and_names_bad_files(run, photographs, tmp_path, script):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    source = photographs / "test"
    for name, origin in (
        ("b.jpg", "dark/0.jpg"), ("sub/a.png", "bright/1.png"), ("c.gif", "middle/3.gif"),
    ):  # fmt: skip
        (folder / name).write_bytes((source / origin).read_bytes())
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "broken.png").write_bytes(b"no image either")
    last = source / "dark" / "1.png"
    out = tmp_path / "table.json"
    code, said, warned = script(
        "predict.py", run, folder, tmp_path / "missing.png", last, "--top", 2, "--batch-size", 2,
        "--out", out,
    )  # fmt: skip
    assert code == 3
    assert said == ""
    assert "broken.png" in warned
    assert "missing.png" in warned
    assert len(warned.splitlines()) == 2
    rows = json.loads(out.read_text())
    assert [row["file"] for row in rows] == [
        str(folder / "b.jpg"), str(folder / "c.gif"), str(folder / "sub" / "a.png"), str(last),
    ]  # fmt: skip
    student = api.load_student(run)
    probabilities, labels = student.probabilities([row["file"] for row in rows]).topk(2)
    for row, values, best in zip(rows, probabilities, labels, strict=True):
        assert [row["class"], row["class_2"]] == [student.classes[label] for label in best]
        assert [row["probability"], row["probability_2"]] == pytest.approx(
            values.tolist(), abs=1e-5
        )


def test_a_table_without_predictions_has_its_columns(run, tmp_path, script):
    out = tmp_path / "table.csv"
    assert script("predict.py", run, tmp_path / "missing.png", "--out", out)[0] == 3
    assert out.read_text() == "file,class,probability\n"


def test_predicting_many_files_holds_few_in_memory(run, photographs, monkeypatch):
    files = api.find_images([photographs])
    student = api.load_student(run)
    decoded = []
    monkeypatch.setattr(
        predicting, "to_pixels", lambda file, _: decoded.append(file) or np.zeros((16, 16, 3), "u1")
    )
    predictions = api.predict_files(student, files, batch_size=10)
    next(predictions)
    predictions.close()
    assert len(decoded) <= 30 < len(files)


def test_predict_rejects_invalid_arguments(run, tmp_path, script):
    (tmp_path / "empty").mkdir()
    assert script("predict.py", run, tmp_path / "empty")[0] == 2
    for arguments in (["--top", 0], ["--batch-size", 0], ["--out", "table.xlsx"]):
        code, _, said = script("predict.py", run, tmp_path / "a.png", *arguments)
        assert (code, said.count("\n")) == (2, 1)
    code, _, said = script("predict.py", tmp_path / "none.onnx", tmp_path / "a.png")
    assert (code, "does not exist" in said) == (2, True)


def test_pt2_files_must_be_trusted(tmp_path):
    with pytest.raises(InputError, match="could execute code"):
        api.load_student(tmp_path / "student.pt2")


def test_untrusted_models_in_safetensors_are_rejected(run, tmp_path):
    student = api.load_student(run)
    path = tmp_path / "student.safetensors"
    node = {"_target_": "os.system", "command": f"touch {tmp_path / 'executed'}"}
    write_safetensors(student.network, node, student.description, path)
    with pytest.raises(InputError, match="rejected"):
        api.load_student(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", ["onnx", "pt2", "safetensors"])
def test_damaged_files_are_rejected(tmp_path, suffix):
    path = tmp_path / f"student.{suffix}"
    path.write_bytes(b"not what it seems" * 10)
    with pytest.raises(InputError, match="damaged"):
        api.load_student(path, trust=[path])


def test_files_of_other_programs_are_rejected(run, exported, tmp_path):
    model = onnx.load(exported.path)
    model.ClearField("metadata_props")
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(InputError, match="was not written by scripts"):
        api.load_student(tmp_path / "other.onnx")
    with pytest.raises(InputError, match="does not describe its model"):
        api.load_student(run / "student.safetensors")


# --- images of all kinds --------------------------------------------------------------------------


def test_all_kinds_of_images_give_the_same_prediction(run, exported, photographs):
    files = [photographs / "test" / "dark" / "1.png", photographs / "test" / "bright" / "4.bmp"]
    opened = [Image.open(file) for file in files]
    arrays = [np.asarray(image.convert("RGB")) for image in opened]
    resized = np.stack([decode(file, 16) for file in files])
    tensor = torch.from_numpy(resized).permute(0, 3, 1, 2)
    for student in (api.load_student(run), api.load_student(exported.path)):
        expected = student.logits(resized)
        for images in (files, [str(file) for file in files], opened, arrays, tensor, tensor / 255):
            torch.testing.assert_close(student.logits(images), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(student.logits(files[1]), expected[1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(student.logits(opened, batch_size=1), expected)
        assert student.logits([]).shape == (0, 3)
    assert api.load_student(run).preprocess([]).shape == (0, 3, 16, 16)


def test_pillow_images_are_turned_upright(run, photographs):
    image = Image.open(photographs / "test" / "dark" / "0.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    path = photographs.parent / "turned.png"
    image.save(path, exif=exif)
    student = api.load_student(run)
    torch.testing.assert_close(student.logits(Image.open(path)), student.logits(path))


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 16, 16, 3), np.float32), np.zeros((3, 16, 16), np.uint8),
        torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 16, 16, dtype=torch.int64), [3], ["missing.png"],
        [np.zeros((1, 16, 16, 3), np.uint8)], Path().glob("*.png"), None,
        torch.full((2, 3, 16, 16), 255.0), torch.full((2, 3, 16, 16), float("nan")),
    ],
)  # fmt: skip
def test_unsupported_images_are_rejected(run, images):
    with pytest.raises(InputError):
        api.load_student(run).predict(images)


def test_a_grey_array_is_named_by_its_shape(run):
    with pytest.raises(InputError, match=r"uint8 and \(16, 16\)"):
        api.load_student(run).predict(np.zeros((16, 16), np.uint8))


def test_arrays_and_files_are_cropped_alike_from_a_larger_stored_size(run, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("metrics.json", "student.safetensors"):
        (copy / name).write_bytes((run / name).read_bytes())
    config = (run / "config.yaml").read_text()
    assert "stored_size: null" in config
    (copy / "config.yaml").write_text(config.replace("stored_size: null", "stored_size: 24"))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    student = api.load_student(copy)
    logits = student.logits([tmp_path / "0.png", tmp_path / "1.png"])
    torch.testing.assert_close(student.logits(list(pixels)), logits)
    torch.testing.assert_close(student.logits(pixels), logits)
    rows = api.predict_files(student, [tmp_path / "0.png", tmp_path / "1.png"], top=3)
    best = student.calibrated(logits).sort(descending=True).values
    torch.testing.assert_close(torch.tensor([row.probabilities for row in rows]), best)
    assert not torch.allclose(api.load_student(run).logits(pixels), logits)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_size", 64), ("stored_size", 8), ("stored_size", 10**6), ("class_names", ["a"]),
        ("std", [0, 0, 0]), ("resize", "bogus"), ("temperature", 1e-300),
    ],
)  # fmt: skip
def test_metadata_that_do_not_fit_the_network_are_rejected(exported, tmp_path, key, value):
    model = onnx.load(exported.path)
    for entry in model.metadata_props:
        if entry.key == key:
            entry.value = json.dumps(value)
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(InputError):
        api.load_student(tmp_path / "changed.onnx")


def test_no_student_of_a_run_is_overwritten(run, tmp_path):
    weights = (run / "student.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(run)
    for folder in (run, run / ".." / run.name, tmp_path / "link"):
        with pytest.raises(InputError):
            api.export(run, "safetensors", out=folder / "student.safetensors")
    with pytest.raises(InputError):
        api.export(run, "onnx", int8=True, max_loss=float("nan"))
    assert (run / "student.safetensors").read_bytes() == weights


# --- results --------------------------------------------------------------------------------------


def test_read_results(run, place):
    table = api.read_results(place / "outputs" / "runs")
    assert list(table["folder"]) == [str(run)]
    assert table["test_accuracy"][0] > 0.95
    with pytest.raises(InputError, match="does not exist"):
        api.read_results(place / "nothing")
