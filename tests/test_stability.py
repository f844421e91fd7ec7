"""What identifies cached outputs or is stored must never change: existing caches stay valid.

Caches are identified by the settings of their views, not by the pixels.
"""

import hashlib

import pytest
import torch

from kd_lightning.data import (
    Augmentation,
    CutMix,
    Mixup,
    RandomOperations,
    ResizedCrop,
    ZeroPadding,
)
from kd_lightning.data.mixing import blend
from kd_lightning.data.views import PLAIN
from kd_lightning.storage.rows import DTYPES, Rows
from kd_lightning.storage.teacher_cache import TeacherCache

INDEX = torch.arange(90)
VIEW = torch.where(INDEX % 10 == 9, PLAIN, INDEX * 7919)


def pictures(height=24, width=20):
    """Pixels in the whole range, from integers."""
    number = torch.arange(len(INDEX) * height * width * 3)
    noise = (number * 2654435761).bitwise_right_shift(13) % 97
    return (noise + number // 31 % 160).to(torch.uint8).view(-1, height, width, 3)


def digest(*tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize(
    ("views", "whole", "part"),
    [
        (Augmentation(cutout=5, seed=3), "4400d0b6f58be798", "4ce64e4e8f66c34b"),
        (ZeroPadding(padding=3), "2dac9d1ceee45766", "a0052cab0abeaec9"),
        (
            RandomOperations(number=2, probability=0.8, cutout=4, seed=1),
            "af6eca41868bbe22",
            "763faebf44178ef8",
        ),
        (
            RandomOperations(Augmentation(padding=0), 3, 0.7, seed=2),
            "11ae565cffe96433",
            "fb54a1c4e3318417",
        ),
        (
            RandomOperations(operations=["saturation", "contrast"]),
            "3bb26b5096ad8372",
            "fb57035502922ddc",
        ),
        (ResizedCrop(seed=4), "d15ac849a78b3c6f", "a4ca0a842f218bbd"),
    ],
)
def test_views(views, whole, part):
    assert digest(views.render(pictures(), INDEX, VIEW)) == whole
    assert digest(views.render(pictures(), INDEX, VIEW, size=16)) == part


@pytest.mark.parametrize(
    ("mixing", "expected"),
    [
        (Mixup(), "2e549c9c9709e3ec"),
        (Mixup(alpha=0.4, probability=0.7, seed=2), "416c1cbf3730aee4"),
        (CutMix(alpha=2.0, probability=0.9), "381d9639e2258da9"),
    ],
)
def test_mixtures(mixing, expected):
    mixture = mixing.mixture(INDEX, VIEW, INDEX[::2], (24, 20))
    own = pictures().permute(0, 3, 1, 2)
    assert digest(mixture.partner, blend(own, own[mixture.partner], mixture)) == expected


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float16", "94beab47044e1dbd"),
        ("bfloat16", "e43a5be1d610e183"),
        ("float32", "14574b803dfeaace"),
    ],
)
def test_rows(tmp_path, dtype, expected):
    """Among them the outputs of packed teachers, which others have published."""
    rows = Rows(tmp_path, {}, 90, (3, 5), DTYPES[dtype])
    values = (torch.arange(90 * 15).view(90, 3, 5) * 7 % 512 - 100).to(DTYPES[dtype]) / 8
    for view in (PLAIN, 0, 70_000):
        rows.reserve(view)
        rows.write(INDEX, torch.full_like(INDEX, view), values)
    content = b"".join(
        (tmp_path / f"view-{v}.rows").read_bytes() for v in ("plain", "00000", "70000")
    )
    assert hashlib.sha256(content).hexdigest()[:16] == expected


def test_folders_of_caches(tmp_path):
    cache = TeacherCache.of(tmp_path, {"teacher": "a", "crop": 4}, 90, {"logits": (3,)})
    assert cache.rows["logits"].folder.name == "teacher-logits-44ffe0664084d19f"
