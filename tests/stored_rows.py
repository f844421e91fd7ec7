"""Rows of a small teacher-output cache."""

from kd_lightning.storage.rows import DTYPES, Rows

IMAGES = 20


def make_rows(folder, shape=(3,), dtype="float16", images=IMAGES):
    return Rows(folder, {"for": "a test"}, images, shape, DTYPES[dtype])
