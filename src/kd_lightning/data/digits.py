"""The handwritten digits of scikit-learn (UCI, Alpaydin & Kaynak 1998): real images without a
download.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from kd_lightning.data.module import ImageDataModule, Images
from kd_lightning.data.splits import stratified_split
from kd_lightning.errors import InputError

TEST_FRACTION = 0.2
TEST_SEED = 0


class DigitsDataModule(ImageDataModule):
    """1,797 grey digits of 8x8 pixels, resized to `image_size`, RGB; a fifth is the test set."""

    @property
    def classes(self) -> list[str]:
        """'0' to '9'."""
        return [str(digit) for digit in range(10)]

    def load(self) -> Images:
        """Read the digits from scikit-learn."""
        values = _values()
        grey = torch.from_numpy(values[:, :-1]).view(-1, 1, 8, 8).float().mul_(255 / 16)
        size = (self.image_size, self.image_size)
        large = F.interpolate(grey, size, mode="bilinear", align_corners=False)
        pixels = large.round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
        labels = torch.from_numpy(values[:, -1]).long()
        train, test = stratified_split(labels, TEST_FRACTION, TEST_SEED, self.classes)
        order = torch.cat([train, test])
        return Images(pixels[order].contiguous(), labels[order], train_size=len(train))


def _values() -> np.ndarray:
    """Rows of 64 pixels from 0 to 16 and the label: (1797, 65), uint8.

    Importing scikit-learn would take a fifth of the time of all imports of a run, so its file
    is read instead of calling `load_digits`.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise InputError(
            "data=digits needs scikit-learn; install it with: pip install -e '.[digits]'"
        )
    path = Path(package.origin).with_name("datasets") / "data" / "digits.csv.gz"
    if path.exists():
        return np.loadtxt(path, delimiter=",", dtype=np.uint8)
    from sklearn.datasets import load_digits  # a version that keeps them elsewhere

    digits = load_digits()
    return np.column_stack([digits.data, digits.target]).astype(np.uint8)
