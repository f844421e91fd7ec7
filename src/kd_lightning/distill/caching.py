"""Opening of the teacher-output caches: when outputs may be cached, and under which key."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from kd_lightning.config.nodes import Node, without
from kd_lightning.config.plan import Plan, TeacherPlan
from kd_lightning.data.checked_views import CHECKED_IMAGES
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.views import PLAIN, Augmentation
from kd_lightning.distill.ensemble import members_of
from kd_lightning.distill.module import DistillationModule
from kd_lightning.distill.recorded import RecordedTeacher
from kd_lightning.distill.top_k import chosen_k
from kd_lightning.errors import InputError
from kd_lightning.losses import Term
from kd_lightning.losses.logit_term import remembers_logits
from kd_lightning.storage.identity import source_sha256, target_paths
from kd_lightning.storage.rows import DTYPES, Rows
from kd_lightning.storage.teacher_cache import GIGABYTE, TeacherCache, folder_name, too_large

log = logging.getLogger(__name__)

LOGITS = "kd_lightning.losses.logit.Logit"
"""The name of logits in a cache key: that of the first term that stored them."""

_NOT_OF_THE_VIEWS = (
    "name", "root", "cache_dir", "streamed", "workers", "stored_size",
    "batch_size", "eval_batch_size", "seed", "views",
)  # fmt: skip


class _Place(NamedTuple):
    """Where the outputs of a run's teachers are stored.

    Attributes:
        root: folder of the caches.
        limit: size of all caches, in bytes.
        names: of the members of an ensemble, or of the teacher.
        keys: what the outputs of each depend on, besides the views.
    """

    root: Path
    limit: float
    names: tuple[str, ...]
    keys: tuple[Node, ...]

    def rows(
        self, member: int, what: str, key: Node, images: int, shape: tuple[int, ...], dtype: str
    ) -> Rows:
        """The rows of one kind of output."""
        key = {**self.keys[member], **key, "dtype": dtype}
        name = folder_name(self.names[member], what, key)
        return Rows(self.root / name, key, images, shape, DTYPES[dtype])


def open_caches(
    module: DistillationModule, plan: Plan, data: ImageDataModule, device: torch.device
) -> None:
    """Attach the teacher-output caches to the module, as far as caching is safe.

    Args:
        module: with a teacher whose weights are loaded.
        plan: the plan of the run.
        data: the data module, set up.
        device: the training device; rounding differs between device types. For a packed teacher,
            that of the recorded outputs counts.

    Raises:
        InputError: the outputs of a packed teacher do not fit, or the file is damaged.
    """
    recorded = module.teacher if isinstance(module.teacher, RecordedTeacher) else None
    # Whether they are cached or not: the result must not depend on that.
    module.reduce_logits(chosen_k(plan.top_k, plan.data.num_classes))
    if plan.cache is None:
        if recorded is not None:
            raise InputError("teacher=packed reads a cache: remember.disk_gb must be above 0")
        return
    index = data.splits["train"][:CHECKED_IMAGES]
    images = data.render(index, torch.zeros_like(index))["images"].cpu()
    images = images.contiguous(memory_format=module.memory_format)
    keys = _teacher_keys(module, plan, data, images, device)
    if keys is None:
        return
    root, limit = plan.cache.root, plan.cache.limit
    place = _Place(root, limit, tuple(part.name for part in plan.teachers), keys)
    if recorded is not None:
        packed = recorded.folder(root.with_name("packed"))
        place = _Place(packed, 0.0, (recorded.packed.name,), keys)

    # Stored exactly: reported accuracies must not depend on rounding.
    shape = len(data.labels), (plan.data.num_classes,), "float32"
    logits = {
        str(number): place.rows(number, "evaluation", {}, *shape) for number in range(len(keys))
    }
    module.evaluation_cache = TeacherCache(logits, place.root, place.limit)
    if recorded is not None:
        recorded.check({"evaluation": logits["0"]}, [PLAIN])

    if why := _why_not_training(module, data, images):
        if recorded is not None:
            raise InputError(f"teacher=packed cannot be used for this run: {why}")
        log.warning("the teacher's outputs on training views are not cached: %s", why)
        return
    rows = _training_rows(module, plan, data, place, _sample(module, recorded, images))
    used = used_views(plan, data)
    if recorded is not None:
        recorded.check(rows, used)
        recorded.unpack(place.root.parent)
        module.cache = TeacherCache(rows, place.root, place.limit)
        return
    large = too_large(rows, used, root, limit)
    for name, size in large.items():
        log.warning(
            "the targets of %s are not cached: those of %d views need %.3g GB, more than is left "
            "of remember.disk_gb=%g and of the disk; a smaller data.views needs less",
            name, len(used), size / GIGABYTE, limit / GIGABYTE,
        )  # fmt: skip
    module.cache = TeacherCache(rows, root, limit, live=tuple(large))


def used_views(plan: Plan, data: ImageDataModule) -> range:
    """The view numbers that a training uses."""
    epochs = plan.student.trainer.arguments["max_epochs"]
    return range(min(epochs, data.views or epochs))


def _teacher_keys(
    module: DistillationModule,
    plan: Plan,
    data: ImageDataModule,
    images: Tensor,
    device: torch.device,
) -> tuple[Node, ...] | None:
    """Cache keys of the members of an ensemble, or of the teacher; None if one must not be cached.

    For the arguments see `open_caches`; the images are a few training views.
    """
    keys = []
    for member, settings in zip(members_of(module.teacher), plan.teachers, strict=True):
        fingerprint = member.fingerprint()
        why = member.why_not_stored(images) if len(images) > 1 else ""
        if why or fingerprint is None:
            why = why or "it has no fingerprint"
            log.warning("the outputs of %s are not cached: %s", settings.name, why)
            return None
        if isinstance(member, RecordedTeacher):
            given = plan.student.trainer.precision, plan.data.normalization
            keys.append(member.key(data.fingerprint(), *given))
        else:
            keys.append(_teacher_key(settings, plan, fingerprint, data.fingerprint(), device))
    return tuple(keys)


def _why_not_training(module: DistillationModule, data: ImageDataModule, images: Tensor) -> str:
    """Why the outputs on training views must not be cached; empty if they may.

    Args:
        module: with the terms.
        data: the data module.
        images: the view 0 of the first training images.
    """
    index = data.splits["train"][: len(images)].flip(0)
    again = data.render(index, torch.zeros_like(index))["images"].cpu().flip(0)
    if not data.reproducible or not torch.equal(images, again):
        return f"the views of {data.name} are not reproducible"
    for name, (_, term) in module.target_parts().items():
        if _term_key(term) is None:
            return f"the term {name.partition('/')[0]} does not implement Term.depends_on"
    return ""


def _training_rows(
    module: DistillationModule,
    plan: Plan,
    data: ImageDataModule,
    place: _Place,
    sample: Mapping[str, Tensor],
) -> dict[str, Rows]:
    """The rows of all targets on training views.

    For the arguments see `open_caches`; the sample contains the targets for a few images.
    """
    assert plan.cache is not None
    parts, views = module.target_parts(), _views_key(plan, data)
    rows = {}
    for name, value in sample.items():
        owner = max((part for part in parts if _is_part(name, part)), key=len)
        number, term = parts[owner]
        key = _term_key(term)
        assert key is not None
        if module.is_reduced(name):
            key = {**key, "top_k": chosen_k(plan.top_k, plan.data.num_classes)}
        what = key["class"].rpartition(".")[2].lower()
        part = name.removeprefix(owner).removeprefix("/")
        whole = {**views, "term": _part_key(key, part)}
        shape = tuple(value.shape[1:])
        rows[name] = place.rows(number, what, whole, data.train_size, shape, plan.cache.dtype)
    return rows


def _sample(
    module: DistillationModule, recorded: RecordedTeacher | None, images: Tensor
) -> dict[str, Tensor]:
    """The targets for a few images, which have the shapes of all targets."""
    try:
        return module.ask_teacher(images if recorded is None else images[:1])
    except Exception as error:
        if recorded is None:
            raise
        raise InputError(f"{recorded.packed.file} describes its layers wrongly: {error}") from error


def _is_part(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}/")


def _teacher_key(
    teacher: TeacherPlan, plan: Plan, fingerprint: str, images_sha256: str, device: torch.device
) -> Node:
    """What the outputs of a teacher depend on, besides the views."""
    code = source_sha256(teacher.model)
    return {
        "format": 1,
        "teacher": {**teacher.model, "weights": fingerprint},
        "normalization": [*teacher.normalization, *plan.data.normalization],
        "images": images_sha256,
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
    code = source_sha256([{"_target_": target} for target in target_paths(node)], *views)
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


def _part_key(key: dict[str, Any], part: str) -> dict[str, Any]:
    """Cache key of one target of a term that has several.

    Args:
        key: the term's key, with or without ``parts``; see `Term.depends_on`.
        part: name of the target; empty if there is only one.
    """
    key = dict(key)
    own = key.pop("parts", None)
    if own is not None:
        return {**key, "part": own[part]}
    return {**key, **({"part": part} if part else {})}


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
