"""How checkpoints are written and found again."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from kd_lightning.files import replacing


class AtomicCheckpoints(TorchCheckpointIO):
    """Atomic checkpoint writes: the previous checkpoint is kept until the new one is complete."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write to a temporary file, then replace the checkpoint atomically."""
        # With a file opened by Python: errors of torch's writer do not give the reason.
        with replacing(Path(path)) as partial, partial.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's follow-up error
                raise error.__context__ or error from None


def remove_partial(folder: Path) -> None:
    """Remove incomplete checkpoints, which a killed training has left."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


class MovableCheckpoints(ModelCheckpoint):
    """Checkpoints in a folder that may be moved between two parts of a training.

    Lightning forgets the best score if the folder has another path than when it was saved.
    """

    @property
    def state_key(self) -> str:
        """That of Lightning's class, under which earlier versions saved the state."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, with the paths of the files in today's folder."""
        moved = {name: self._here(state_dict[name]) for name in state_dict if name in PATHS}
        best = {self._here(path): score for path, score in state_dict["best_k_models"].items()}
        here = {"dirpath": self.dirpath, "best_k_models": best}
        super().load_state_dict({**state_dict, **moved, **here})

    def _here(self, path: str) -> str:
        return str(Path(self.dirpath or "", Path(path).name)) if path else path
