"""A data module of an image folder, streamed or in memory."""

from kd_lightning.data import FolderDataModule


def module(root, cache=None, streamed=True, **settings):
    settings = {"batch_size": 8, "eval_batch_size": 5, "image_size": 16, "padding": 2, **settings}
    cache_dir = None if cache is None else str(cache)
    data = FolderDataModule(
        str(root), cache_dir=cache_dir, streamed=streamed, name="folder", **settings
    )
    data.setup()
    return data
