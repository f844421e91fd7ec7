"""Find or train the teacher of a run, and let its outputs be stored."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import seed_everything

from kd_lightning import fitting
from kd_lightning.building import SUPERVISED, channels_last, normalizations, resolve_precision
from kd_lightning.config import Node, trainer_node
from kd_lightning.contents import source_sha256
from kd_lightning.data.module import ImageDataModule
from kd_lightning.distillation import DistillationModule
from kd_lightning.divergence import first_not_finite
from kd_lightning.errors import InputError
from kd_lightning.fitting import build_trainer
from kd_lightning.frozen import CHECKED_IMAGES, FrozenTeacher
from kd_lightning.losses import Logit, Term
from kd_lightning.memory import DTYPES, GIGABYTE, Memory, Rows, folder_name
from kd_lightning.models import Output, count_parameters
from kd_lightning.runs import RunDirectory, load_weights, versions
from kd_lightning.teachers import StoredTeacher, TeacherStore, teacher_key, weights_sha256

log = logging.getLogger(__name__)


def equip_teacher(teacher: FrozenTeacher, config: Node, data: ImageDataModule) -> dict[str, Any]:
    """Give the teacher its weights, training it first if nobody has.

    Returns:
        What is known of it: key and accuracies; nothing of the user's own checkpoint.
    """
    if config["teacher"]["checkpoint"] is not None:
        return {}
    precision = resolve_precision(trainer_node(config, teacher=True), teacher.model)
    key = teacher_key(config, data, precision)
    store = TeacherStore(Path(config["output_dir"]) / "teachers")
    stored: StoredTeacher = store.obtain(
        config["teacher"]["name"],
        key,
        lambda folder: train_teacher(config, data, precision, RunDirectory(folder)),
    )
    load_weights(teacher.model, stored.weights)
    check_weights(teacher, str(stored.weights))
    return {
        "teacher_key": key,
        "teacher_val_accuracy": stored.facts["val_accuracy"],
        "teacher_test_accuracy": stored.facts["test_accuracy"],
    }


def check_weights(teacher: FrozenTeacher, origin: str) -> None:
    """Check that a teacher's weights are numbers.

    Args:
        teacher: with its weights.
        origin: what to call the file that they come from.

    Raises:
        InputError: one of them is NaN or infinite.
    """
    name = first_not_finite(teacher.model.named_parameters())
    if name is not None:
        raise InputError(
            f"the teacher's weights are not finite ('{name}' in {origin}): "
            "its training has diverged, or the file is damaged"
        )


def equip_memory(
    module: DistillationModule,
    config: Node,
    data: ImageDataModule,
    precision: str,
    device: torch.device,
) -> None:
    """Let the module keep what its teacher, complete with its weights, says.

    Args:
        module: with a teacher.
        config: of the run.
        data: loaded.
        precision: as Lightning calls it.
        device: that computes; devices of another kind round differently.
    """
    settings = config["remember"]
    if not settings["disk_gb"]:
        return
    assert module.teacher is not None
    expects, given = normalizations(config)
    root = Path(config["output_dir"]) / "teachers" / "remembered"
    limit = settings["disk_gb"] * GIGABYTE

    def rows(what: str, key: Node, images: int, shape: tuple[int, ...], dtype: str) -> Rows:
        key = {**teacher, **key, "dtype": dtype}
        folder = root / folder_name(config["teacher"]["name"], what, key)
        return Rows(folder, key, images, shape, DTYPES[dtype])

    teacher: Node = {
        "format": 1,
        "teacher": {**config["teacher"]["model"], "weights": weights_sha256(module.teacher.model)},
        "normalization": [*expects, *given],
        "images": data.fingerprint(),
        "precision": precision,
        # Left out where there is none: what was stored before stays known.
        **({"code": code} if (code := source_sha256(config["teacher"]["model"])) else {}),
        **({"device": device.type} if device.type != "cpu" else {}),
    }
    index = data.splits["train"][:CHECKED_IMAGES]
    images = data.render(index, torch.zeros_like(index))["images"].cpu()
    if len(images) > 1 and (why := module.teacher.why_not_stored(images)):
        log.warning("the teacher's outputs are not stored: %s", why)
        return
    # Evaluation is exact: what it reports must not depend on a rounding.
    classes = config["data"]["num_classes"]
    kept = {"logits": rows("evaluation", {}, len(data.labels), (classes,), "float32")}
    module.evaluation_memory = Memory(kept, root, limit)

    terms = {name: cast(Term, term) for name, term in module.terms.items() if term.needs_teacher}
    why = "" if data.reproducible else f"the views of {data.name} are not reproducible"
    for name, term in terms.items():
        if _cache_key(term, classes) is None:
            why = f"the term {name} does not say what it depends on (Term.depends_on)"
    if why:
        log.warning("the teacher's outputs in training are not stored: %s", why)
        return
    code = source_sha256({"_target_": config["data"]["_target_"]})
    views: Node = {
        "split": [data.val_fraction, data.split_seed],
        "augmentation": asdict(data.augmentation),
        **({"code": code} if code else {}),
    }
    said = module.ask_teacher(images)
    kept = {}
    for name, term in terms.items():
        what = _cache_key(term, classes)
        assert what is not None
        readable = what["class"].rpartition(".")[2].lower()
        shape = tuple(said[name].shape[1:])
        kept[name] = rows(
            readable, {**views, "term": what}, data.train_size, shape, settings["dtype"]
        )
    module.memory = Memory(kept, root, limit)


def _cache_key(term: Term, classes: int) -> dict[str, Any] | None:
    """What a term's stored rows depend on besides teacher and view; None if it does not say.

    Terms that remember the same share their rows: all that remember the plain logits, and a
    subclass that does not change `remember`. What a term is called in the configuration is nothing
    to them.
    """
    if _remembers_logits(term, classes):
        return {"class": f"{Logit.__module__}.{Logit.__qualname__}"}
    depends_on = term.depends_on()
    if depends_on is None:
        return None
    kind = next(kind for kind in type(term).__mro__ if "remember" in vars(kind))
    name = f"{kind.__module__}.{kind.__qualname__}"
    code = source_sha256({"_target_": name})
    return {"class": name, **({"code": code} if code else {}), **depends_on}


def _remembers_logits(term: Term, classes: int) -> bool:
    """Whether `remember` is the identity on logits of any size, infinities and NaN included."""
    scale = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 10.0, 1e2, 1e4, 1e30, torch.inf, torch.nan])
    logits = (
        torch.linspace(-1.5, 2, len(scale) * classes).view(len(scale), classes) * scale[:, None]
    )
    try:
        found = [term.remember(Output(logits.clone(), {})) for _ in range(2)]
    except Exception:  # it reads features, or refuses such numbers
        return False
    return all(
        isinstance(rows, torch.Tensor)
        and rows.dtype == logits.dtype
        and torch.equal(rows.view(torch.int32), logits.view(torch.int32))
        for rows in found
    )


def train_teacher(
    config: Node, data: ImageDataModule, precision: str, directory: RunDirectory
) -> dict[str, Any]:
    """Train the configured teacher on the labels and leave `teacher.safetensors`."""
    teacher = config["teacher"]
    settings = trainer_node(config, teacher=True)
    expects, _ = normalizations(config)
    data = data.variant(
        seed=teacher["seed"],
        views=None,
        mean=expects.mean,
        std=expects.std,
        augmentation=replace(data.augmentation, cutout=teacher["cutout"], seed=teacher["seed"]),
    )
    seed_everything(teacher["seed"], verbose=False)
    module = DistillationModule(
        student=teacher["model"],
        terms=SUPERVISED,
        optimizer=teacher["optimizer"],
        scheduler=teacher["scheduler"],
        num_classes=config["data"]["num_classes"],
        image_size=config["data"]["image_size"],
        channels_last=channels_last(settings, precision),
    )
    directory.write_config(config)
    resume = directory.checkpoint()
    name = f"teacher {teacher['name']}"
    trainer = build_trainer(
        settings, precision, directory.path, name, resume, pictures=config.get("pictures", True)
    )
    results = fitting.fit(trainer, module, data, directory, "teacher", resume)
    results |= fitting.test(trainer, module, data, directory, results, update_bn=False)
    return {"parameters": count_parameters(module.student), **results, **versions()}
