"""Opening of the teacher-output caches: when outputs may be cached, and under which key."""

import logging
from dataclasses import asdict
from typing import Any, cast

import torch

from kd_lightning.config.nodes import Node, without
from kd_lightning.config.plan import Plan, TeacherPlan
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.views import Augmentation
from kd_lightning.distill.ensemble import members_of
from kd_lightning.distill.module import DistillationModule
from kd_lightning.distill.teacher import CHECKED_IMAGES
from kd_lightning.distill.top_k import chosen_k
from kd_lightning.losses import Term
from kd_lightning.losses.logit_term import remembers_logits
from kd_lightning.storage.identity import source_sha256, targets
from kd_lightning.storage.rows import DTYPES, Rows
from kd_lightning.storage.teacher_cache import GIGABYTE, TeacherCache, folder_name, too_large

log = logging.getLogger(__name__)

LOGITS = "kd_lightning.losses.logit.Logit"
"""The name of logits in a cache key: that of the first term that stored them."""

_NOT_OF_THE_VIEWS = (
    "name", "root", "cache_dir", "batch_size", "eval_batch_size", "seed", "views",
)  # fmt: skip


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
    index = data.splits["train"][:CHECKED_IMAGES]
    images = data.render(index, torch.zeros_like(index))["images"].cpu()
    members = members_of(module.teacher)
    keys = []
    for member, settings in zip(members, plan.teachers, strict=True):
        if len(images) > 1 and (why := member.why_not_stored(images)):
            log.warning("the outputs of %s are not cached: %s", settings.name, why)
            return
        fingerprint = member.fingerprint()
        if fingerprint is None:
            log.warning("the outputs of %s are not cached: it has no fingerprint", settings.name)
            return
        keys.append(_teacher_key(settings, plan, fingerprint, data.fingerprint(), device))
    root, limit = plan.cache.root, plan.cache.limit

    def rows(
        member: int, what: str, key: Node, images: int, shape: tuple[int, ...], dtype: str
    ) -> Rows:
        key = {**keys[member], **key, "dtype": dtype}
        name = folder_name(plan.teachers[member].name, what, key)
        return Rows(root / name, key, images, shape, DTYPES[dtype])

    # Stored exactly: reported accuracies must not depend on rounding.
    classes = plan.data.num_classes
    kept = {
        str(number): rows(number, "evaluation", {}, len(data.labels), (classes,), "float32")
        for number in range(len(members))
    }
    module.evaluation_cache = TeacherCache(kept, root, limit)

    why = "" if data.reproducible else f"the views of {data.name} are not reproducible"
    module.reduce_logits(chosen_k(plan.cache.top_k, classes))
    parts = {
        name: (number, _term_key(term)) for name, (number, term) in module.target_parts().items()
    }
    for name, (_, key) in parts.items():
        if key is None:
            why = f"the term {name.partition('/')[0]} does not implement Term.depends_on"
    if why:
        log.warning("the teacher's outputs on training views are not cached: %s", why)
        return
    views = _views_key(plan, data)
    kept = {}
    for name, value in module.ask_teacher(images).items():
        owner = max((part for part in parts if _is_part(name, part)), key=len)
        number, key = parts[owner]
        assert key is not None
        if module.is_reduced(name):
            key = {**key, "top_k": chosen_k(plan.cache.top_k, classes)}
        what = key["class"].rpartition(".")[2].lower()
        part = name.removeprefix(owner).removeprefix("/")
        whole = {**views, "term": {**key, **({"part": part} if part else {})}}
        kept[name] = rows(
            number, what, whole, data.train_size, tuple(value.shape[1:]), plan.cache.dtype
        )
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


def _is_part(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}/")


def _teacher_key(
    teacher: TeacherPlan, plan: Plan, fingerprint: str, images: str, device: torch.device
) -> Node:
    """What the outputs of a teacher depend on, besides the views."""
    code = source_sha256(teacher.model)
    return {
        "format": 1,
        "teacher": {**teacher.model, "weights": fingerprint},
        "normalization": [*teacher.normalization, *plan.data.normalization],
        "images": images,
        "precision": plan.student.trainer.precision,
        # Omitted if empty, so that caches of earlier versions stay valid.
        **({"code": code} if code else {}),
        **({"device": device.type} if device.type != "cpu" else {}),
    }


def _views_key(plan: Plan, data: ImageDataModule) -> Node:
    """What the training views depend on."""
    node = plan.data.node
    views = node.get("augmentation"), node.get("mixing")
    # Of the data itself without its files, which are images.
    code = source_sha256([{"_target_": target} for target in targets(node)], *views)
    # A data module may define views of its own, which depend on any of its arguments.
    whole = without(node, *_NOT_OF_THE_VIEWS)
    standard = type(data.augmentation) is Augmentation  # a subclass may render anything
    return {
        "split": [data.val_fraction, data.split_seed],
        "augmentation": (
            asdict(cast(Augmentation, data.augmentation)) if standard else views[0] or whole
        ),
        **({"mixing": views[1] or whole} if data.mixing is not None else {}),
        **({"code": code} if code else {}),
    }


def _term_key(term: Term) -> dict[str, Any] | None:
    """Cache key of a term's rows, besides teacher and view; None if the term does not define one.

    Terms with identical targets share their rows: every `LogitTerm`, and subclasses that do not
    override `remember`. The term's name in the configuration is not part of the key.
    """
    if remembers_logits(term):
        return {"class": LOGITS}
    depends_on = term.depends_on()
    if depends_on is None:
        return None
    kind = next(kind for kind in type(term).__mro__ if "remember" in vars(kind))
    name = f"{kind.__module__}.{kind.__qualname__}"
    code = source_sha256({"_target_": name})
    return {"class": name, **({"code": code} if code else {}), **depends_on}
