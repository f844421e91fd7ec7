"""The teacher store: every teacher is trained once, under a lock, verified, and reused.

A teacher is identified by a hash of everything that determines its weights. It is trained in a
temporary folder, which is renamed atomically when complete.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_lightning.config.plan import TeacherPlan
from kd_lightning.errors import InputError
from kd_lightning.files import hold, tidy, write_json
from kd_lightning.storage.identity import file_sha256, source_sha256

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredTeacher:
    """A complete teacher on disk.

    Attributes:
        path: its folder.
        key: see `teacher_key`.
        facts: validation and test accuracy, parameters, epochs, seconds.
        sha256: of the file with its weights, in hex. Teachers of one key, trained on different
            machines, may differ in it.
    """

    path: Path
    key: str
    facts: dict[str, Any]
    sha256: str

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.path / "teacher.safetensors"


def teacher_key(plan: TeacherPlan, images_sha256: str, initial_sha256: str = "") -> str:
    """SHA-256, in hex, of everything that determines the teacher's weights.

    Args:
        plan: the plan of the teacher.
        images_sha256: fingerprint of the data set.
        initial_sha256: hash of the weights that a fine-tuned teacher starts from.
    """
    code = source_sha256(*plan.own_nodes)
    # Omitted if empty, so that teachers of earlier versions stay valid.
    more = {key: value for key, value in (("code", code), ("initial", initial_sha256)) if value}
    recipe = {**plan.recipe, "images": images_sha256, **more}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


class TeacherStore:
    """The folder of trained teachers.

    Args:
        root: the folder; created with the first teacher.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def obtain(self, name: str, key: str, train: Callable[[Path], dict[str, Any]]) -> StoredTeacher:
        """Return the stored teacher with this key, or train it.

        Concurrent processes that need the same teacher wait for the first one to train it. In a
        store that cannot be written it must be complete.

        Args:
            name: human-readable name, the prefix of the folder name.
            key: from `teacher_key`.
            train: trains a teacher in a folder, which is empty or contains an interrupted training
                to resume; writes `teacher.safetensors` and returns the facts.

        Raises:
            InputError: the store cannot be written, or a file of the teacher cannot be read.
        """
        place = self.root / f"{tidy(name)}-{key[:16]}"
        busy = f"another process is training the teacher {place.name}"
        try:
            held = hold(place.with_name(f"{place.name}.lock"), busy)
        except OSError as error:  # a store of other users is read only
            if (stored := _read(place, key)) is not None:
                return stored
            raise InputError(
                f"output_dir: the teacher store {self.root} cannot be written ({error.strerror})"
            ) from error
        with held:
            stored = self._find(place, key)
            if stored is None:
                stored = self._train(place, key, train)
        return stored

    def _find(self, place: Path, key: str) -> StoredTeacher | None:
        if not place.exists():
            return None
        if (stored := _read(place, key)) is not None:
            return stored
        number = 1
        while (aside := place.with_name(f"{place.name}.damaged-{number}")).exists():
            number += 1
        place.rename(aside)
        log.warning(
            "the stored teacher %s is damaged; it was moved to %s and is being retrained",
            place, aside.name,
        )  # fmt: skip
        return None

    def _train(
        self, place: Path, key: str, train: Callable[[Path], dict[str, Any]]
    ) -> StoredTeacher:
        # Reused, to resume an interrupted training: the same name means the same teacher.
        partial = place.with_name(f"{place.name}.partial")
        partial.mkdir(exist_ok=True)
        facts = train(partial)
        digest = file_sha256(partial / "teacher.safetensors")
        write_json(partial / "teacher.json", {"key": key, "sha256": digest, "facts": facts})
        partial.rename(place)
        shutil.rmtree(place / "checkpoints", ignore_errors=True)  # not before it is complete
        return StoredTeacher(place, key, facts, digest)


def _read(place: Path, key: str) -> StoredTeacher | None:
    """The teacher in a folder; None if it is not complete or has not this key.

    Raises:
        InputError: a file cannot be read now, though it may be intact.
    """
    path = place / "teacher.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        facts = manifest["facts"]
        known = all(isinstance(facts[fact], float) for fact in ("val_accuracy", "test_accuracy"))
        stored = StoredTeacher(place, key, facts, manifest["sha256"])
        path = stored.weights
        whole = known and manifest["key"] == key and file_sha256(path) == stored.sha256
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return None  # the last: too deeply nested
    except OSError as error:
        raise InputError(
            f"the stored teacher {path} cannot be read ({error.strerror or error}); "
            "run the same command again once it can"
        ) from error
    return stored if whole else None
