"""The teacher-output cache: correct targets, no recomputation, and no more disk than allowed."""

import errno
import fcntl
import logging
import os
import re
import resource
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_rows import IMAGES, make_rows

from kd_lightning.distill.teacher import FrozenTeacher, Normalization
from kd_lightning.errors import InputError
from kd_lightning.models import ConvNet, ResNet9
from kd_lightning.storage import teacher_cache as memory
from kd_lightning.storage.rows import Rows
from kd_lightning.storage.teacher_cache import TeacherCache, stored

CPU = torch.device("cpu")


class Teacher:
    """Returns values that encode image, view and term, and records the calls."""

    def __init__(self, index, view):
        self.index, self.view, self.asked = index, view, []

    def __call__(self):
        index, view = self.index, self.view
        self.asked += list(zip(index.tolist(), view.tolist(), strict=True))
        number = (index * 100 + view).float()[:, None] + 1 / 3
        return {"a": number, "b": -number.expand(-1, 2)}


def make_memory(root, limit=1e9, dtype="float16", terms=("a", "b")):
    shapes = {"a": (1,), "b": (2,)}
    rows = {term: make_rows(root / term, shapes[term], dtype) for term in terms}
    return TeacherCache(rows, root, limit)


def recall(cache_, index, view):
    index, view = torch.as_tensor(index), torch.as_tensor(view)
    teacher = Teacher(index, view)
    return cache_.fetch(index, view, CPU, teacher), teacher


def expected(index, view, dtype=torch.float16):
    return (torch.as_tensor(index) * 100 + torch.as_tensor(view) + 1 / 3).to(dtype).float()


def test_cached_outputs_are_not_recomputed_and_equally_rounded(tmp_path):
    first, teacher = recall(make_memory(tmp_path), [1, 2, 3], [0, 0, 0])
    assert teacher.asked == [(1, 0), (2, 0), (3, 0)]
    again, teacher = recall(make_memory(tmp_path), [3, 1, 2], [0, 0, 0])
    assert not teacher.asked
    assert torch.equal(again["a"], first["a"][[2, 0, 1]])
    # The view matters as well as the image.
    mixed, teacher = recall(make_memory(tmp_path), [1, 2, 5, 3], [0, 1, 0, 0])
    assert teacher.asked == [(1, 0), (2, 1), (5, 0), (3, 0)]  # never a part of a batch
    for values in (mixed["a"][:, 0], -mixed["b"][:, 0], -mixed["b"][:, 1]):
        assert torch.equal(values, expected([1, 2, 5, 3], [0, 1, 0, 0]))


def test_batch_of_one_image(tmp_path):
    for asked in ([(3, 0)], []):
        values, teacher = recall(make_memory(tmp_path), [3], [0])
        assert teacher.asked == asked
        assert torch.equal(values["a"][:, 0], expected([3], [0]))


def test_additional_term_does_not_change_the_others(tmp_path):
    recall(make_memory(tmp_path, terms=("a",)), [1, 2], [0, 0])
    both, teacher = recall(make_memory(tmp_path), [1, 2, 3], [0, 0, 0])
    assert teacher.asked == [(1, 0), (2, 0), (3, 0)]
    assert torch.equal(both["a"][:, 0], expected([1, 2, 3], 0))
    _, teacher = recall(make_memory(tmp_path), [1, 2, 3], [0, 0, 0])
    assert not teacher.asked


def test_disk_limit_causes_one_warning(tmp_path, caplog):
    size = sum(rows.file_size for rows in make_memory(tmp_path).rows.values())
    cache_ = make_memory(tmp_path, limit=1.5 * size)
    with caplog.at_level(logging.WARNING):
        for view in (0, 1, 2):
            for _ in range(2):
                values, teacher = recall(cache_, [1, 2], [view, view])
                assert torch.equal(values["a"][:, 0], expected([1, 2], view))
    assert teacher.asked
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "disk_gb" in caplog.text
    assert memory.used_bytes(tmp_path) == size
    _, teacher = recall(cache_, [1, 2], [0, 0])
    assert not teacher.asked  # existing rows are still used


def test_terms_that_do_not_fit_are_computed_and_the_others_stay_cached(tmp_path):
    rows = make_memory(tmp_path).rows
    sizes = {name: part.file_size for name, part in rows.items()}
    views = range(3)
    assert memory.too_large(rows, views, tmp_path, 3 * sum(sizes.values())) == {}
    limit = 3 * sum(sizes.values()) - 1
    assert memory.too_large(rows, views, tmp_path, limit) == {"b": 3 * sizes["b"]}
    assert set(memory.too_large(rows, views, tmp_path, 1)) == {"a", "b"}
    cache_ = TeacherCache(rows, tmp_path, limit, live=("b",))
    for _ in range(2):
        values, teacher = recall(cache_, [1, 2], [0, 0])
        assert len(teacher.asked) == 2  # for b
        assert torch.equal(values["a"][:, 0], expected([1, 2], 0))
        assert torch.equal(values["b"][:, 0], -expected([1, 2], 0))  # rounded as if stored
    assert memory.used_bytes(tmp_path) == sizes["a"]
    values, teacher = recall(make_memory(tmp_path, terms=("a",)), [1, 2], [0, 0])
    assert not teacher.asked
    # What is stored already needs no more space.
    assert "a" not in memory.too_large(rows, range(1), tmp_path, sizes["a"])


def test_whole_view_with_a_live_term(tmp_path):
    recall(make_memory(tmp_path, terms=("a",)), range(IMAGES), [0] * IMAGES)
    cache_ = TeacherCache(make_memory(tmp_path).rows, tmp_path, 1e9, live=("b",))
    values, teacher = recall(cache_, [3, 1], [0, 0])
    assert len(teacher.asked) == 2
    assert torch.equal(values["a"][:, 0], expected([3, 1], 0))
    assert torch.equal(values["b"][:, 1], -expected([3, 1], 0))


def test_a_cache_may_be_removed_while_sizes_are_added_up(tmp_path, caplog):
    other = tmp_path / "other-cache"
    other.mkdir()
    (other / "view-00000.rows").symlink_to(tmp_path / "gone")  # listed, but not there any more
    with caplog.at_level(logging.WARNING):
        recall(make_memory(tmp_path), [1, 2], [0, 0])
    assert not caplog.text
    _, teacher = recall(make_memory(tmp_path), [1, 2], [0, 0])
    assert not teacher.asked


def test_file_system_without_fallocate(tmp_path, monkeypatch):
    allocate = os.posix_fallocate

    def emulated(descriptor, *range_):
        # glibc, if the file system does not know the call.
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        allocate(descriptor, *range_)

    monkeypatch.setattr(os, "posix_fallocate", emulated)
    recall(make_memory(tmp_path), [1, 2], [0, 0])
    _, teacher = recall(make_memory(tmp_path), [1, 2], [0, 0])
    assert not teacher.asked


def test_full_disk_causes_a_warning(tmp_path, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with caplog.at_level(logging.WARNING):
            values, _ = recall(make_memory(tmp_path), [1, 2], [0, 0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(values["a"][:, 0], expected([1, 2], 0))
    assert "File too large" in caplog.text
    assert memory.used_bytes(tmp_path) == 0  # no incomplete file is left
    _, teacher = recall(make_memory(tmp_path), [1, 2], [0, 0])
    assert teacher.asked


@pytest.mark.parametrize("model", [lambda: ConvNet([64, 128, 256], hidden=512), ResNet9])
def test_teacher_output_does_not_depend_on_the_batch(model):
    """So that seeds can share cached outputs; not guaranteed for batches of a few images."""
    torch.manual_seed(0)
    half = Normalization((0.5,) * 3, (0.5,) * 3)
    teacher = FrozenTeacher(model(), half, half)
    teacher.prepare(CPU, torch.channels_last, None)
    images = torch.randn(64, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    whole = teacher(images).clone()
    order = torch.randperm(64)
    assert torch.equal(teacher(images[order]), whole[order])
    for size in (32, 50):
        part = images[:size].contiguous(memory_format=torch.channels_last)
        assert torch.equal(teacher(part), whole[:size])


def test_overflowing_outputs_are_returned_but_not_cached(tmp_path):
    rows = {"a": make_rows(tmp_path / "a", (1,))}
    cache_ = TeacherCache(rows, tmp_path, 1e9)
    big = torch.tensor([[1.0], [1e9]])
    for _ in range(2):
        index = torch.tensor([1, 2])
        got = cache_.fetch(index, index * 0, CPU, lambda: {"a": big})
        assert torch.equal(got["a"], big)
    assert rows["a"].read(index, index * 0)[1].tolist() == [True, False]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whole_view_gives_the_same_targets_as_single_rows(tmp_path_factory, data):
    """Also with damaged files, and rows that other processes add meanwhile."""
    results = []
    damage = data.draw(st.lists(st.integers(0, 10**6), max_size=4))
    order = data.draw(st.permutations(range(IMAGES)))
    written = data.draw(st.integers(0, IMAGES))
    for largest in (0, memory.LARGEST_VIEW):
        root = tmp_path_factory.mktemp("rows")
        recall(make_memory(root), list(range(written)) or [0], [0] * (written or 1))
        for path in root.glob("*/*.rows"):
            content = bytearray(path.read_bytes())
            for place in damage:
                content[place % len(content)] ^= 1 + place % 255
            path.write_bytes(content)
        cache_, found = make_memory(root), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "LARGEST_VIEW", largest)
            for part in (order[:7], order[7:14], order[:7], order[14:]):
                values, teacher = recall(cache_, part, [0] * len(part))
                found.append((values["a"].tolist(), values["b"].tolist(), teacher.asked))
        results.append(found)
    assert results[0] == results[1]


def test_rows_of_a_complete_view_are_read_once(tmp_path, monkeypatch):
    recall(make_memory(tmp_path), range(IMAGES), [0] * IMAGES)
    recall(make_memory(tmp_path), range(IMAGES), [1] * IMAGES)
    cache_, calls = make_memory(tmp_path), Counter()
    for name in ("read", "load"):
        original = getattr(Rows, name)

        def counting(self, *arguments, name=name, original=original):
            calls[name] += 1
            return original(self, *arguments)

        monkeypatch.setattr(Rows, name, counting)
    for view in (0, 1):
        for part in ([3, 1, 4], [5, 9, 2]):
            values, teacher = recall(cache_, part, [view] * 3)
            assert not teacher.asked
            assert torch.equal(values["a"][:, 0], expected(part, view))
    assert calls == {"load": 4}  # two terms, two views
    mixed, _ = recall(cache_, [3, 1], [0, 1])
    assert torch.equal(mixed["a"][:, 0], expected([3, 1], [0, 1]))
    assert calls["read"] == 2


def test_removing_a_cache_in_use_has_no_effect(tmp_path):
    cache_ = make_memory(tmp_path)
    recall(cache_, [1, 2], [0, 0])
    for entry in stored(tmp_path):
        memory.remove(entry.folder)
    values, _ = recall(cache_, [1, 2, 3], [0, 0, 0])
    assert torch.equal(values["a"][:, 0], expected([1, 2, 3], 0))
    values, teacher = recall(make_memory(tmp_path), [1, 2], [0, 0])
    assert teacher.asked
    assert torch.equal(values["a"][:, 0], expected([1, 2], 0))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_the_number_of_views(tmp_path):
    rows = make_rows(tmp_path)
    cache_ = TeacherCache({"term": rows}, tmp_path, limit=1e9)
    index = torch.arange(IMAGES)
    for view in range(5 * Rows.OPEN_FILES):
        cache_.fetch(
            index, torch.full_like(index, view), CPU, lambda: {"term": torch.zeros(IMAGES, 3)}
        )
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = sum(str(tmp_path) in line for line in maps)
    assert 0 < mapped <= Rows.OPEN_FILES


def plain_cache(root, **changes):
    base = {"key": {}, "images": 20, "shapes": {"logits": (10,)}}
    return TeacherCache.of(root, **{**base, **changes})


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        ({"logits": torch.zeros(8, 5)}, "has the shape (8, 5)"),
        ({"logits": torch.zeros(8, 20)}, "has the shape (8, 20)"),
        ({"logits": torch.zeros(8, 10, 1, 1)}, "has the shape (8, 10, 1, 1)"),
        ({"logits": torch.zeros(1, 10)}, "has the shape (1, 10)"),
        ({"features": torch.zeros(8, 10)}, "is missing"),
    ],
)
def test_answer_of_another_shape_is_rejected(tmp_path, answer, given):
    index = torch.arange(8)
    cache_ = plain_cache(tmp_path)
    with pytest.raises(InputError) as error:
        cache_.fetch(index, index * 0, CPU, lambda: answer)
    assert str(error.value) == (
        f"the teacher's output logits must be a tensor of shape (8, 10) for this batch, but {given}"
    )
    assert not cache_.rows["logits"].read(index, index * 0)[1].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "float64"}, "one of float16, bfloat16, float32, not float64"),
        ({"dtype": torch.float16}, "one of float16, bfloat16, float32, not torch.float16"),
        *(({"shapes": {"logits": shape}}, f"not {shape}") for shape in ((), (0,), (-1, 2), 10)),
        *(({"shapes": {name: (3,)}}, f"not {name}") for name in ("block/1", "../../x", "a b", "ä")),
    ],
)
def test_invalid_cache_is_rejected(tmp_path, change, words):
    with pytest.raises(InputError, match=re.escape(words)):
        plain_cache(tmp_path, **change)


@pytest.mark.parametrize("index", [[0, 20], [-1, 0], [0, 1, 2]])
def test_batch_of_unknown_images_is_rejected(tmp_path, index):
    index = torch.tensor(index)
    with pytest.raises(InputError, match="one view number for each index"):
        plain_cache(tmp_path).fetch(index, torch.zeros(2, dtype=torch.long), CPU, dict)


def test_batch_without_images(tmp_path):
    none = torch.zeros(0, dtype=torch.long)
    assert plain_cache(tmp_path).fetch(none, none, CPU, dict)["logits"].shape == (0, 10)


def test_answer_has_no_gradient_and_device_may_be_text(tmp_path):
    index, answer = torch.arange(8), torch.randn(8, 10, requires_grad=True)
    for _ in range(2):
        found = plain_cache(tmp_path).fetch(index, index * 0, "cpu", lambda: {"logits": answer})
        assert not found["logits"].requires_grad
        assert torch.equal(found["logits"], answer.detach().half().float())


@pytest.mark.parametrize("view", [-2, 2**31, 2**32 - 2])
def test_view_numbers_are_limited(tmp_path, view):
    """The checksum of a row of zeros would be that of image 0 in view -2."""
    with pytest.raises(InputError, match="view number for each index, from -1"):
        recall(make_memory(tmp_path), [0, 1], [view, view])
    values, _ = recall(make_memory(tmp_path), [0, 1], [-1, -1])
    assert torch.equal(values["a"].flatten(), expected([0, 1], [-1, -1]))


def test_a_key_may_contain_infinity(tmp_path):
    cache = TeacherCache.of(tmp_path, {"margin": float("inf")}, 2, {"logits": (3,)})
    for _ in range(2):
        cache.fetch(
            torch.arange(2), torch.zeros(2).long(), CPU, lambda: {"logits": torch.ones(2, 3)}
        )
    (entry,) = stored(tmp_path)
    assert entry.views == 1
