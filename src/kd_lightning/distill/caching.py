"""Opening of the teacher-output caches: when outputs may be cached, and under which key."""

import logging
from dataclasses import asdict
from typing import Any, cast

import torch

from kd_lightning.config.nodes import Node
from kd_lightning.config.plan import Plan
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.views import Augmentation
from kd_lightning.distill.module import DistillationModule
from kd_lightning.distill.teacher import CHECKED_IMAGES
from kd_lightning.losses import Logit, Term
from kd_lightning.models import Output
from kd_lightning.storage.identity import source_sha256, targets
from kd_lightning.storage.rows import DTYPES, Rows
from kd_lightning.storage.teacher_cache import GIGABYTE, TeacherCache, folder_name, too_large

log = logging.getLogger(__name__)


def open_caches(
    module: DistillationModule, plan: Plan, data: ImageDataModule, device: torch.device
) -> None:
    """Attach the teacher-output caches to the module, as far as caching is safe.

    Args:
        module: with a teacher whose weights are loaded.
        plan: the plan of the run.
        data: the data module, set up.
        device: the training device; rounding differs between device types.
    """
    if plan.cache is None:
        return
    assert module.teacher is not None
    assert plan.teacher is not None
    index = data.splits["train"][:CHECKED_IMAGES]
    images = data.render(index, torch.zeros_like(index))["images"].cpu()
    if len(images) > 1 and (why := module.teacher.why_not_stored(images)):
        log.warning("the teacher's outputs are not cached: %s", why)
        return
    fingerprint = module.teacher.fingerprint()
    if fingerprint is None:
        log.warning("the teacher's outputs are not cached: the teacher has no fingerprint")
        return
    root, limit = plan.cache.root, plan.cache.limit
    code = source_sha256(plan.teacher.model)
    teacher: Node = {
        "format": 1,
        "teacher": {**plan.teacher.model, "weights": fingerprint},
        "normalization": [*plan.teacher.normalization, *plan.data.normalization],
        "images": data.fingerprint(),
        "precision": plan.student.trainer.precision,
        # Omitted if empty, so that caches of earlier versions stay valid.
        **({"code": code} if code else {}),
        **({"device": device.type} if device.type != "cpu" else {}),
    }
    owner = plan.teacher.name

    def rows(what: str, key: Node, images: int, shape: tuple[int, ...], dtype: str) -> Rows:
        key = {**teacher, **key, "dtype": dtype}
        return Rows(root / folder_name(owner, what, key), key, images, shape, DTYPES[dtype])

    # Stored exactly: reported accuracies must not depend on rounding.
    classes = plan.data.num_classes
    kept = {"logits": rows("evaluation", {}, len(data.labels), (classes,), "float32")}
    module.evaluation_cache = TeacherCache(kept, root, limit)

    terms = {name: cast(Term, term) for name, term in module.terms.items() if term.needs_teacher}
    keys = {name: _term_key(term, classes) for name, term in terms.items()}
    why = "" if data.reproducible else f"the views of {data.name} are not reproducible"
    for name, key in keys.items():
        if key is None:
            why = f"the term {name} does not implement Term.depends_on"
    if why:
        log.warning("the teacher's outputs on training views are not cached: %s", why)
        return
    code = source_sha256([{"_target_": target} for target in targets(plan.data.node)])
    views: Node = {
        "split": [data.val_fraction, data.split_seed],
        "augmentation": (
            asdict(data.augmentation)
            if isinstance(data.augmentation, Augmentation)
            else plan.data.node["augmentation"]
        ),
        **({"mixing": plan.data.node["mixing"]} if data.mixing is not None else {}),
        **({"code": code} if code else {}),
    }
    outputs = module.ask_teacher(images)
    kept = {}
    for name, key in keys.items():
        assert key is not None
        what = key["class"].rpartition(".")[2].lower()
        shape = tuple(outputs[name].shape[1:])
        kept[name] = rows(what, {**views, "term": key}, data.train_size, shape, plan.cache.dtype)
    epochs = plan.student.trainer.arguments["max_epochs"]
    used = range(min(epochs, data.views or epochs))
    large = too_large(kept, used, root, limit)
    for name, size in large.items():
        log.warning(
            "the targets of %s are not cached: those of %d views need %.3g GB, more than is left "
            "of remember.disk_gb=%g and of the disk; data.views=K uses K views",
            name, len(used), size / GIGABYTE, limit / GIGABYTE,
        )  # fmt: skip
    module.cache = TeacherCache(kept, root, limit, live=tuple(large))


def _term_key(term: Term, classes: int) -> dict[str, Any] | None:
    """Cache key of a term's rows, besides teacher and view; None if the term does not define one.

    Terms with identical targets share their rows: all that store the plain logits, and subclasses
    that do not override `remember`. The term's name in the configuration is not part of the key.
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
    """Whether `remember` returns the logits unchanged, including infinities and NaN."""
    scale = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 10.0, 1e2, 1e4, 1e30, torch.inf, torch.nan])
    logits = (
        torch.linspace(-1.5, 2, len(scale) * classes).view(len(scale), classes) * scale[:, None]
    )
    try:
        found = [term.remember(Output(logits.clone(), {})) for _ in range(2)]
    except Exception:  # it reads features, or rejects such values
        return False
    return all(
        isinstance(rows, torch.Tensor)
        and rows.dtype == logits.dtype
        and torch.equal(rows.view(torch.int32), logits.view(torch.int32))
        for rows in found
    )
