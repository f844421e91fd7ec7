"""A user's augmentation and mixing are checked before anything is trained."""

import pytest
import torch
from conftest import FOLDER, TINY, write_folder

from kd_lightning import api
from kd_lightning.config.checks import check
from kd_lightning.data import CutMix, FolderDataModule, Mixup, RandomOperations
from kd_lightning.data.checked_views import check_views
from kd_lightning.data.mixing import Mixture
from kd_lightning.data.views import PLAIN
from kd_lightning.errors import InputError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("own"))


@pytest.fixture
def data(images):
    def make(**arguments):
        module = FolderDataModule(
            name="x", root=str(images), cache_dir=str(images.parent / "decoded"), image_size=16,
            padding=2, batch_size=8, **arguments,
        )  # fmt: skip
        module.setup()
        return module

    return make


class Own:
    """Views that are changed by a function."""

    def __init__(self, change, plain_too=False):
        self.change, self.plain_too = change, plain_too

    def render(self, images, index, view):
        out = images[index].permute(0, 3, 1, 2)
        changed = self.plain_too or bool((view != PLAIN).any())
        return self.change(out) if changed else out


@pytest.mark.parametrize(
    ("augmentation", "words"),
    [
        (Own(lambda x: x[:, :, ::2]), "uint8 (8, 3, 8, 16)"),
        (Own(lambda x: x[:1]), "uint8 (1, 3, 16, 16)"),
        (Own(lambda x: x.float()), "float32 (8, 3, 16, 16)"),
        (Own(lambda x: x.permute(0, 2, 3, 1)), "uint8 (8, 16, 16, 3)"),
        (Own(lambda x: 255 - x, plain_too=True), "validation and test images"),
    ],
)
def test_views_of_the_wrong_kind(data, augmentation, words):
    with pytest.raises(InputError, match=r"^Own\.render") as error:
        check_views(data(augmentation=augmentation))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("partner", "ratio"),
    [
        (lambda index: torch.full_like(index, 37), 0.5),  # a test image
        (lambda index: index + 1, 0.5),
        (lambda index: index[:1], 0.5),
        (lambda index: index, 1.5),
        (lambda index: index, -0.1),
        (lambda index: index, float("nan")),
    ],
)
def test_mixtures_of_the_wrong_kind(data, partner, ratio):
    class Mixing:
        def mixture(self, index, view, train, size):
            return Mixture(partner(index), torch.full((len(index),), ratio))

    with pytest.raises(InputError, match=r"^Mixing\.mixture"):
        check_views(data(mixing=Mixing()))


@pytest.mark.parametrize("mixing", [None, Mixup(), CutMix()])
@pytest.mark.parametrize("augmentation", [None, Own(lambda x: 255 - x), RandomOperations()])
def test_right_views_are_accepted(data, augmentation, mixing):
    check_views(data(augmentation=augmentation, mixing=mixing))


class Floats:
    """Views of the wrong type."""

    def render(self, images, index, view):
        return images[index].permute(0, 3, 1, 2).float()


@pytest.fixture
def settings(images, tmp_path):
    return [*FOLDER, *TINY, f"data.root={images}", f"output_dir={tmp_path}", "method=logit"]


@pytest.mark.parametrize("part", ["data", "teacher"])
def test_views_are_checked_before_anything_is_trained(settings, tmp_path, part):
    with pytest.raises(InputError, match=r"^Floats\.render must return"):
        api.run(*settings, f"{part}.augmentation={{_target_: test_checked_views.Floats}}")
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("part", ["data", "teacher"])
def test_cutout_beside_an_augmentation(settings, part):
    config = api.compose(*settings, f"{part}.cutout=4", "data.num_classes=3")
    check(config)
    config[part]["augmentation"] = {"_target_": "kd_lightning.data.Augmentation", "cutout": 4}
    with pytest.raises(InputError, match=rf"{part}\.cutout=4 has no effect"):
        check(config)


def test_renderer_of_random_operations_must_know_the_parameters_too(data):
    operations = RandomOperations(of=Own(lambda x: 255 - x))
    assert data(augmentation=operations).cannot_render("rows") == (
        "Own.render has no parameter 'rows'"
    )
    assert not data(augmentation=RandomOperations()).cannot_render("rows", "size")
