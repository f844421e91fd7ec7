"""Image folders: classes, validation, files of other programs, and names of all kinds."""

import os
import unicodedata

import pytest
import torch
from conftest import in_a_new_process
from image_folders import folder_data, sizes
from PIL import Image

from kd_lightning.data import ImageDataModule, Images
from kd_lightning.errors import InputError

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def of_colour(root, part, name, colour, count=2):
    (root / part / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (8, 8), colour).save(root / part / name / f"{number}.png")


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_folder_is_the_validation_set(folder, name):
    before = folder_data(folder)
    before.setup()
    for label in range(3):
        of_colour(folder, name, f"class{label}", "white", count=label + 1)
    data = folder_data(folder, val_fraction=0.5)
    assert sizes(data) == {"train": 36, "val": 6, "test": 12}
    assert data.train_size == 42
    parts = [set(index.tolist()) for index in data.splits.values()]
    assert [min(part) for part in parts] == [0, 36, 42]
    (batch,) = list(data.val_dataloader())
    assert (batch["images"] > 0.999).all()
    assert batch["labels"].tolist() == [0, 1, 1, 2, 2, 2]
    # Training uses exactly the images of train.
    seen = torch.cat([batch["shown"].index for batch in data.train_dataloader()])
    assert sorted(seen.tolist()) == list(range(36))
    assert data.fingerprint() != before.fingerprint()


def test_run_with_a_validation_folder(train, folder):
    """Including the teacher and its cached outputs."""
    for label in range(3):
        of_colour(folder, "val", f"class{label}", "white", count=2)
    done = train("method=combined", "trainer.precision=32-true", "trainer.max_epochs=1")
    assert done.code == 0, done.err
    accuracies = [done.metrics[f"{role}val_accuracy"] for role in ("", "teacher_")]
    # White images of three classes: any prediction is right for a third of them.
    assert accuracies == [pytest.approx(1 / 3), pytest.approx(1 / 3)]


def test_fingerprint_includes_the_validation_split():
    class Data(ImageDataModule):
        classes = ("a", "b")
        val_size = 0

        def load(self):
            generator = torch.Generator().manual_seed(0)
            pixels = torch.randint(0, 256, (20, 8, 8, 3), dtype=torch.uint8, generator=generator)
            return Images(pixels, torch.arange(20) % 2, 16, self.val_size)

    prints = set()
    for size in (0, 2, 4):
        data = Data(name="own", batch_size=2, image_size=8)
        data.val_size = size
        data.setup()
        assert len(data.splits["val"]) == size or not size
        prints.add(data.fingerprint())
    assert len(prints) == 3


def test_a_source_without_test_images_is_rejected():
    class Data(ImageDataModule):
        classes = ("a", "b")

        def load(self):
            pixels = torch.zeros(20, 8, 8, 3, dtype=torch.uint8)
            return Images(pixels, torch.arange(20) % 2, train_size=20)

    with pytest.raises(InputError, match="own has no test images"):
        Data(name="own", batch_size=2, image_size=8).setup()


def test_class_with_one_image_and_a_validation_folder(tmp_path):
    for part in ("train", "val", "test"):
        for name in ("a", "b"):
            of_colour(tmp_path, part, name, "red", count=1)
    assert sizes(folder_data(tmp_path, batch_size=2)) == {"train": 2, "val": 2, "test": 2}


def test_validation_folder_must_have_the_same_classes(folder):
    of_colour(folder, "val", "class0", "white")
    with pytest.raises(InputError, match=r"train and .*val must have the same.*class1, class2"):
        folder_data(folder)


def test_two_validation_folders_are_rejected(folder):
    for name in ("val", "valid"):
        for label in range(3):
            of_colour(folder, name, f"class{label}", "white")
    with pytest.raises(InputError, match="'val' and 'valid'"):
        folder_data(folder)


def test_broken_link_as_validation_folder_is_rejected(folder):
    (folder / "val").symlink_to(folder / "moved")
    with pytest.raises(InputError, match=r"val is a broken link"):
        folder_data(folder)


def test_validation_without_test_folder_gets_a_suggestion(folder):
    (folder / "test").rename(folder / "val")
    with pytest.raises(InputError, match=r"no folder 'test'.*data.test_folder=val"):
        folder_data(folder)


def test_class_folders_without_a_split_are_recognised(folder):
    with pytest.raises(InputError, match=r"no folder 'train'.*class0 looks like a class"):
        folder_data(folder / "train")


def test_unused_folders_and_images_cause_a_warning(folder, caplog):
    (folder / "dev" / "class0").mkdir(parents=True)
    (folder / "__MACOSX").mkdir()
    (folder / "README.txt").write_text("nothing to do with it")
    Image.new("RGB", (8, 8)).save(folder / "train" / "loose.png")
    folder_data(folder).setup()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert str(folder / "dev") in said[0]
    assert "__MACOSX" not in said[0]
    assert "loose.png" in said[1]


@pytest.mark.parametrize(
    "name", ["Thumbs.db", "desktop.ini", ".DS_Store", "Icon\r", "._0.png", ".hidden", "ehthumbs.db"]
)
def test_files_of_file_managers_are_skipped(folder, name):
    (folder / "train" / "class0" / name).write_bytes(b"")
    (folder / "test" / name).write_bytes(b"")
    assert sizes(folder_data(folder)) == {"train": 33, "val": 3, "test": 12}


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", ".ipynb_checkpoints"])
def test_folders_of_file_managers_are_not_classes(folder, name):
    (folder / "train" / name).mkdir()
    (folder / "train" / "class0" / name).mkdir()
    assert folder_data(folder).classes == ["class0", "class1", "class2"]
    assert sizes(folder_data(folder)) == {"train": 33, "val": 3, "test": 12}


@pytest.mark.parametrize("make", [lambda p: p.write_bytes(b""), lambda p: p.mkdir(), os.mkfifo])
def test_non_image_with_image_suffix_is_rejected(folder, make):
    make(folder / "train" / "class0" / "odd.png")
    with pytest.raises(InputError, match=r"odd\.png is "):
        folder_data(folder).setup()


def test_class_names_are_unicode_normalised(folder):
    for part, name in (("train", NFD), ("test", NFC), ("val", NFD)):
        (folder / part).mkdir(exist_ok=True)
        of_colour(folder, part, name, "white")
    for label in range(3):
        of_colour(folder, "val", f"class{label}", "white")
    data = folder_data(folder)
    assert data.classes == [NFC, "class0", "class1", "class2"]
    data.setup()
    (batch,) = list(data.test_dataloader())
    assert (batch["images"][batch["labels"] == 0] > 0.999).all()


def test_class_in_two_unicode_forms_is_rejected(folder):
    for name in (NFC, NFD):
        of_colour(folder, "train", name, "white")
    with pytest.raises(InputError, match=f"two folders for the class '{NFC}'"):
        folder_data(folder)


# --- names that are not UTF-8 ---------------------------------------------------------------------


def latin_1(path, name):
    return path / os.fsdecode(name.encode("latin-1"))


def test_file_and_class_names_with_arbitrary_bytes(folder, tmp_path):
    (folder / "train" / "class0").rename(latin_1(folder / "train", "café"))
    (folder / "test" / "class0").rename(latin_1(folder / "test", "café"))
    (folder / "train" / "class1" / "1.png").rename(latin_1(folder / "train" / "class1", "é.png"))
    for _ in range(2):  # the second iteration reads the cache
        data = folder_data(folder, cache_dir=str(tmp_path / "decoded"))
        assert sizes(data) == {"train": 33, "val": 3, "test": 12}
        assert data.classes == [r"caf\xe9", "class1", "class2"]
    assert len(list((tmp_path / "decoded").iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_message_with_arbitrary_bytes_is_printable(folder, content):
    latin_1(folder / "train" / "class1", "é.png").write_bytes(content)
    with pytest.raises(InputError) as refused:
        folder_data(folder).setup()
    assert r"\xe9.png" in str(refused.value)
    str(refused.value).encode()


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_non_ascii_names_in_an_ascii_locale(folder, tmp_path, fresh):
    """Only a fresh interpreter decodes names by the locale; the output is ASCII in both."""
    root = folder.rename(tmp_path / "été")
    (root / "dev").mkdir()
    (root / "train" / "class1" / "é.png").write_bytes(b"")
    done = in_a_new_process(
        "train.py", "data=folder", "method=none", "data.image_size=16", "data.batch_size=8",
        f"data.root='{root}'", f"output_dir={tmp_path / 'outputs'}", f"data_dir={tmp_path}",
        LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii", fresh=fresh,
    )  # fmt: skip
    assert done.code == 2
    assert "Traceback" not in done.err
    assert r"\xe9.png is empty" in done.err
    assert r"\xe9t\xe9/dev" in done.err


def test_control_characters_in_names_are_escaped(folder):
    (folder / "train" / "class1" / "\x1b[2J\n.png").write_bytes(b"")
    with pytest.raises(InputError) as refused:
        folder_data(folder).setup()
    assert r"\x1b[2J\n.png is empty" in str(refused.value)
