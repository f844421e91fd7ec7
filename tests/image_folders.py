"""The data module of an image folder, and the sizes of its parts."""

from kd_lightning.data import FolderDataModule


def folder_data(root, **settings):
    settings = {"batch_size": 8, "image_size": 16, "padding": 2, **settings}
    return FolderDataModule(str(root), name="folder", **settings)


def sizes(data):
    data.setup()
    return {name: len(index) for name, index in data.splits.items()}
