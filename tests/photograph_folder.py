"""Images of three classes in files of many kinds, and a stranger's network for them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from kd_lightning.data.decoding import decode
from kd_lightning.models import ConvNet

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
