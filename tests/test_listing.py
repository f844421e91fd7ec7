"""Layouts of image folders: classes, ImageNet, Tiny ImageNet; see also test_image_folders.py."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd_lightning.data import FolderDataModule
from kd_lightning.data.listing import FolderListing
from kd_lightning.errors import InputError

IDS = ("n01443537", "n01629819", "n02012849")


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def tiny(tmp_path):
    """Tiny ImageNet as it is unpacked: 3 classes of 4 training and 2 validation images."""
    root = tmp_path / "tiny-imagenet-200"
    lines = []
    for label, name in enumerate(IDS):
        for number in range(4):
            picture(root / "train" / name / "images" / f"{name}_{number}.JPEG", 10 * label + number)
        (root / "train" / name / f"{name}_boxes.txt").write_text("boxes")
    for number in range(6):  # classes in turn
        picture(root / "val" / "images" / f"val_{number}.JPEG", 100 + number)
        lines.append(f"val_{number}.JPEG\t{IDS[2 - number % 3]}\t0\t32\t44\t62\n")
        picture(root / "test" / "images" / f"test_{number}.JPEG", 200 + number)
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(IDS))
    (root / "words.txt").write_text(
        "n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn01629819\tcrane\n"
        "n02012849\tcrane, bird\n"
    )
    return root


@pytest.fixture
def imagenet(tmp_path):
    root = tmp_path / "imagenet"
    for label, name in enumerate(IDS):
        for number in range(4):
            picture(root / "train" / name / f"{name}_{number}.JPEG", 10 * label + number)
        for number in range(2):
            picture(root / "val" / name / f"val_{number}.JPEG", 100 + 10 * label + number)
    return root


def data(root, **settings):
    settings = {"batch_size": 4, "image_size": 8, **settings}
    return FolderDataModule(str(root), name="folder", **settings)


def sizes(module):
    module.setup()
    return {name: len(index) for name, index in module.splits.items()}


def test_tiny_imagenet(tiny, caplog):
    caplog.set_level("INFO")
    module = data(tiny)
    assert module.count() == 12
    assert sizes(module) == {"train": 9, "val": 3, "test": 6}
    (said,) = (record.getMessage() for record in caplog.records)
    assert f"{tiny}/val is the test set" in said
    files = module.listing.files()
    test = dict(
        zip([Path(path).name for path in files.paths[12:]], files.labels[12:].tolist(), strict=True)
    )
    assert test == {f"val_{number}.JPEG": 2 - number % 3 for number in range(6)}


def test_layout_does_not_change_the_fingerprint(tiny, tmp_path):
    """The same images as class folders, as many scripts on the web rearrange them."""
    module = data(tiny)
    module.setup()
    other = tmp_path / "sorted"
    for path, label in zip(*module.listing.files()[:2], strict=True):
        part = "train" if "train" in Path(path).parts else "test"
        place = other / part / IDS[label] / Path(path).name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(Path(path).read_bytes())
    again = data(other)
    again.setup()
    assert again.fingerprint() == module.fingerprint()


def test_class_names_are_words(tiny):
    names = ["goldfish", "crane (n01629819)", "crane (n02012849)"]
    assert data(tiny).classes == names
    (tiny / "words.txt").unlink()
    assert data(tiny).classes == list(IDS)
    (tiny / "LOC_synset_mapping.txt").write_text("n01443537 gold fish, Carassius auratus\n")
    assert data(tiny).classes == ["gold fish", *IDS[1:]]


def test_words_of_other_folders_are_not_used(folder):
    (folder / "words.txt").write_text("class0 nothing\n")
    assert data(folder).classes == ["class0", "class1", "class2"]


@pytest.mark.parametrize("unlabelled", [None, "test_0.JPEG", "images/test_0.JPEG"])
def test_imagenet(imagenet, caplog, unlabelled):
    caplog.set_level("INFO")
    if unlabelled:
        picture(imagenet / "test" / unlabelled, 0)
    assert sizes(data(imagenet)) == {"train": 9, "val": 3, "test": 6}
    (said,) = (record.getMessage() for record in caplog.records)
    assert "val is the test set, because ImageNet has no labels of its test images" in said
    assert "validation images are split off train" in said


def test_val_of_imagenet_classes_is_honoured_beside_a_labelled_test(imagenet):
    for label, name in enumerate(IDS):
        picture(imagenet / "test" / name / "0.JPEG", 300 + label)
    assert sizes(data(imagenet)) == {"train": 12, "val": 6, "test": 3}


def test_test_folder_is_a_choice(imagenet, folder):
    for name in IDS:
        picture(imagenet / "held out" / name / "0.JPEG", 1)
    assert sizes(data(imagenet, test_folder="held out")) == {"train": 12, "val": 6, "test": 3}
    assert sizes(data(imagenet, test_folder="val")) == {"train": 9, "val": 3, "test": 6}
    # Otherwise, a validation folder is never the test set unasked.
    (folder / "test").rename(folder / "val")
    with pytest.raises(InputError, match=r"choose data\.test_folder=val"):
        data(folder)
    assert sizes(data(folder, test_folder="val")) == {"train": 33, "val": 3, "test": 12}


@pytest.mark.parametrize("name", ["train", "nowhere", "", "../images/test", "."])
def test_invalid_test_folder_is_rejected(folder, name):
    with pytest.raises(InputError, match=r"data\.test_folder=.* is not a folder of data\.root"):
        data(folder, test_folder=name)


def test_val_images_without_class_folders_are_explained(imagenet):
    """As in the archive of ImageNet's validation images."""
    for path in list((imagenet / "val").rglob("*.JPEG")):
        path.rename(imagenet / "val" / f"{path.parent.name}{path.name}")
    for name in IDS:
        (imagenet / "val" / name).rmdir()
    with pytest.raises(InputError, match=r"val has no class folders.*val/<class>/"):
        data(imagenet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace("\t", " "),
            "line 1: expected the names",
        ),
        (
            lambda text: text.replace("val_1.JPEG", "val_0.JPEG"),
            r"line 2: val_0\.JPEG occurs twice",
        ),
        (lambda text: text.replace("val_5", "val_6"), r"once; not in both are: val_5.*, val_6"),
        (
            lambda text: text.replace(IDS[1], "n99999999"),
            f"only one of them has: {IDS[1]}, n99999999",
        ),
        (lambda text: text + "\udcff", "cannot be read"),
    ],
)
def test_faulty_annotations_are_rejected(tiny, change, message):
    file = tiny / "val" / "val_annotations.txt"
    file.write_text(change(file.read_text()), errors="surrogateescape")
    with pytest.raises(InputError, match=message) as refused:
        data(tiny).setup()
    assert str(file) in str(refused.value) or "same classes" in str(refused.value)


def test_a_copy_rearranged_in_place_may_keep_the_annotations(tiny):
    before = data(tiny)
    before.setup()
    lines = (tiny / "val" / "val_annotations.txt").read_text().splitlines()
    for file, name in (line.split("\t")[:2] for line in lines):
        place = tiny / "val" / name / "images"
        place.mkdir(parents=True, exist_ok=True)
        (tiny / "val" / "images" / file).rename(place / file)
    (tiny / "val" / "images").rmdir()
    after = data(tiny)
    after.setup()
    assert after.fingerprint() == before.fingerprint()


def test_annotations_may_have_a_byte_order_mark_and_decomposed_names(tmp_path):
    root = tmp_path / "set"
    for number, name in enumerate(("caf\u00e9", "bar")):
        for part in range(4):
            picture(root / "train" / name / f"{part}.JPEG", 10 * number + part)
        picture(root / "val" / "images" / f"{number}.JPEG", 100 + number)
    (root / "val" / "val_annotations.txt").write_text(
        "\ufeff0.JPEG\tcafe\u0301\n1.JPEG\tbar\n", encoding="utf-8"
    )
    module = data(root)
    module.setup()
    assert list(module.classes) == ["bar", "caf\u00e9"]


def test_changed_annotations_change_the_digest(tiny):
    before, again = (FolderListing(tiny).files() for _ in range(2))
    assert before.digest == again.digest
    file = tiny / "val" / "val_annotations.txt"
    file.write_text(
        file.read_text().replace(IDS[0], "x").replace(IDS[1], IDS[0]).replace("x", IDS[1])
    )
    after = FolderListing(tiny).files()
    assert before.digest != after.digest
    assert FolderListing(tiny).files("key").digest != after.digest


def test_images_beside_a_folder_of_images_are_rejected(tiny):
    picture(tiny / "train" / IDS[0] / "loose.JPEG", 0)
    with pytest.raises(InputError, match=rf"{IDS[0]} has a folder 'images', and 'loose\.JPEG'"):
        data(tiny).setup()


def test_a_class_may_be_called_images(tmp_path):
    for part in ("train", "test"):
        for name in ("images", "texts"):
            for number in range(3):
                picture(tmp_path / part / name / f"{number}.png", number)
    assert data(tmp_path).classes == ["images", "texts"]
    assert sizes(data(tmp_path)) == {"train": 4, "val": 2, "test": 6}


def test_other_files_are_ignored_with_a_warning(folder, caplog):
    before = data(folder)
    before.setup()
    for name in ("notes.txt", "labels.csv"):
        (folder / "train" / "class0" / name).write_text("")
    module = data(folder)
    module.setup()
    (said,) = (record.getMessage() for record in caplog.records)
    assert "labels.csv" in said
    assert "1 more" in said
    assert module.count() == before.count() == 36
    assert module.fingerprint() == before.fingerprint()


def test_folders_in_class_folders_are_rejected(folder):
    (folder / "train" / "class0" / "more").mkdir()
    with pytest.raises(InputError, match="more is not an image file"):
        data(folder).setup()


@pytest.mark.parametrize("inside", ["images", "val_annotations.txt"])
def test_links_out_of_tiny_imagenet_are_rejected(tiny, tmp_path, inside):
    place = tiny / "val" / inside
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link to outside"):
        data(tiny).setup()


def test_part_of_the_real_tiny_imagenet(tmp_path):
    archive = Path(os.environ.get("KD_TEST_DATA", "nowhere")) / "tiny-imagenet-part.tar.gz"
    if not archive.exists():
        pytest.skip(f"KD_TEST_DATA is not a folder that contains {archive.name}")
    with tarfile.open(archive) as tar:
        wanted = [
            member for member in tar
            if member.name.split("/")[1] in ("n01443537", "n02124075") and member.isfile()
        ]  # fmt: skip
        tar.extractall(tmp_path, wanted, filter="data")
    assert sizes(data(tmp_path, image_size=64)) == {"train": 90, "val": 10, "test": 20}
