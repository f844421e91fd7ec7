"""Location of the configuration tree."""

from pathlib import Path


def tree() -> str:
    """Hydra's search path of the configuration tree: in a checkout, else in the installed wheel."""
    checkout = Path(__file__).resolve().parents[3] / "configs"
    return str(checkout) if checkout.is_dir() else "pkg://kd_lightning.configs"


def tree_folder() -> str:
    """The configuration tree as a folder, for `hydra.initialize_config_dir`."""
    address = tree()
    return str(Path(__file__).parents[1] / "configs") if address.startswith("pkg://") else address
