"""Predictions of runs and of exported files, for files and arrays of all kinds."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from kd_lightning import api
from kd_lightning.data.decoding import decode
from kd_lightning.errors import InputError
from kd_lightning.inference.exported import write_safetensors
from kd_lightning.workflows import predict as predicting

# --- prediction -----------------------------------------------------------------------------------


def test_predict_keeps_the_order_and_names_bad_files(distilled, photographs, tmp_path, script):
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
        "predict.py", distilled, folder, tmp_path / "missing.png", last, "--top", 2,
        "--batch-size", 2, "--out", out,
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
    student = api.load_student(distilled)
    probabilities, labels = student.probabilities([row["file"] for row in rows]).topk(2)
    for row, values, best in zip(rows, probabilities, labels, strict=True):
        assert [row["class"], row["class_2"]] == [student.classes[label] for label in best]
        assert [row["probability"], row["probability_2"]] == pytest.approx(
            values.tolist(), abs=1e-5
        )


def test_every_folder_is_searched_or_reported(tmp_path, monkeypatch):
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for place in (photos / "@eaDir", photos / "closed", elsewhere):
        place.mkdir(parents=True)
        (place / "a.png").touch()
    (photos / "linked").symlink_to(elsewhere)
    (photos / "again").symlink_to(photos)
    (photos / "first").symlink_to(photos / "really")
    (photos / "really").mkdir()
    (photos / "really" / "b.png").touch()
    (photos / "up").symlink_to(tmp_path)
    (elsewhere / "back").symlink_to(photos)
    (photos / "twice").symlink_to(elsewhere)
    (photos / ".cache").mkdir()
    (photos / ".cache" / "c.png").touch()
    (photos / "cached").symlink_to(photos / ".cache")
    scan = os.scandir

    def refuse(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    names = ("closed", "cached/c.png", "linked/a.png", "really/b.png")
    expected = [photos / name for name in names]
    assert api.find_images([photos]) == expected
    long = tmp_path / ("x" * 300)
    assert api.find_images([long]) == [long]


def test_a_run_without_readable_metrics_is_reported(distilled, tmp_path, caplog):
    run = shutil.copytree(distilled, tmp_path / "run")
    (run / "metrics.json").write_text("{")
    assert not api.load_student(run).classes
    assert "the names of the classes and the fitted temperature are unknown" in caplog.text


def test_a_table_without_predictions_has_its_columns(distilled, tmp_path, script):
    out = tmp_path / "table.csv"
    assert script("predict.py", distilled, tmp_path / "missing.png", "--out", out)[0] == 3
    assert out.read_text() == "file,class,probability\n"


def test_predicting_many_files_holds_few_in_memory(distilled, photographs, monkeypatch):
    files = api.find_images([photographs])
    student = api.load_student(distilled)
    decoded = []
    monkeypatch.setattr(
        predicting, "to_pixels", lambda file, _: decoded.append(file) or np.zeros((16, 16, 3), "u1")
    )
    predictions = api.predict_files(student, files, batch_size=10)
    next(predictions)
    predictions.close()
    assert len(decoded) <= 30 < len(files)


def test_predict_rejects_invalid_arguments(distilled, tmp_path, script):
    (tmp_path / "empty").mkdir()
    assert script("predict.py", distilled, tmp_path / "empty")[0] == 2
    for arguments in (["--top", 0], ["--batch-size", 0], ["--out", "table.xlsx"]):
        code, _, said = script("predict.py", distilled, tmp_path / "a.png", *arguments)
        assert (code, said.count("\n")) == (2, 1)
    code, _, said = script("predict.py", tmp_path / "none.onnx", tmp_path / "a.png")
    assert (code, "does not exist" in said) == (2, True)


def test_pt2_files_must_be_trusted(tmp_path):
    with pytest.raises(InputError, match="could execute code"):
        api.load_student(tmp_path / "student.pt2")


def test_untrusted_models_in_safetensors_are_rejected(distilled, tmp_path):
    student = api.load_student(distilled)
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


def test_files_of_other_programs_are_rejected(distilled, exported, tmp_path):
    model = onnx.load(exported.path)
    model.ClearField("metadata_props")
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(InputError, match="was not written by scripts"):
        api.load_student(tmp_path / "other.onnx")
    with pytest.raises(InputError, match="does not describe its model"):
        api.load_student(distilled / "student.safetensors")


# --- images of all kinds --------------------------------------------------------------------------


def test_all_kinds_of_images_give_the_same_prediction(distilled, exported, photographs):
    files = [photographs / "test" / "dark" / "1.png", photographs / "test" / "bright" / "4.bmp"]
    opened = [Image.open(file) for file in files]
    arrays = [np.asarray(image.convert("RGB")) for image in opened]
    resized = np.stack([decode(file, 16) for file in files])
    tensor = torch.from_numpy(resized).permute(0, 3, 1, 2)
    for student in (api.load_student(distilled), api.load_student(exported.path)):
        expected = student.logits(resized)
        for images in (files, [str(file) for file in files], opened, arrays, tensor, tensor / 255):
            torch.testing.assert_close(student.logits(images), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(student.logits(files[1]), expected[1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(student.logits(opened, batch_size=1), expected)
        assert student.logits([]).shape == (0, 3)
    assert api.load_student(distilled).preprocess([]).shape == (0, 3, 16, 16)


def test_pillow_images_are_turned_upright(distilled, photographs):
    image = Image.open(photographs / "test" / "dark" / "0.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    path = photographs.parent / "turned.png"
    image.save(path, exif=exif)
    student = api.load_student(distilled)
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
def test_unsupported_images_are_rejected(distilled, images):
    with pytest.raises(InputError):
        api.load_student(distilled).predict(images)


def test_a_grey_array_is_named_by_its_shape(distilled):
    with pytest.raises(InputError, match=r"uint8 and \(16, 16\)"):
        api.load_student(distilled).predict(np.zeros((16, 16), np.uint8))


def test_arrays_and_files_are_cropped_alike_from_a_larger_stored_size(distilled, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("metrics.json", "student.safetensors"):
        (copy / name).write_bytes((distilled / name).read_bytes())
    config = (distilled / "config.yaml").read_text()
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
    assert not torch.allclose(api.load_student(distilled).logits(pixels), logits)


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


# --- results --------------------------------------------------------------------------------------


def test_read_results(distilled, shipping):
    table = api.read_results(shipping / "outputs" / "runs")
    assert list(table["folder"]) == [str(distilled)]
    assert table["test_accuracy"][0] > 0.95
    with pytest.raises(InputError, match="does not exist"):
        api.read_results(shipping / "nothing")
