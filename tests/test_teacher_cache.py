"""The teacher-output cache: correct rows, no recomputation, unchanged results."""

import contextlib
import errno
import fcntl
import logging
import os
import resource
import shutil
import signal
import time
from collections import Counter
from functools import cache
from pathlib import Path

import processes
import pytest
import torch
from conftest import FOLDER, TINY, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_lightning import api
from kd_lightning.data import FolderDataModule
from kd_lightning.data.views import PLAIN
from kd_lightning.distill.caching import _term_key
from kd_lightning.distill.teacher import FrozenTeacher, Normalization
from kd_lightning.errors import InputError
from kd_lightning.losses import DIST, DKD, MLKD, NKD, HardLabel, Logit
from kd_lightning.models import ConvNet, ResNet9
from kd_lightning.storage import teacher_cache as memory
from kd_lightning.storage.rows import DTYPES, Rows
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.storage.teacher_cache import TeacherCache, stored
from kd_lightning.storage.teacher_store import teacher_key
from kd_lightning.workflows import student

IMAGES = 20
CPU = torch.device("cpu")


def make_rows(folder, shape=(3,), dtype="float16", images=IMAGES):
    return Rows(folder, {"for": "a test"}, images, shape, DTYPES[dtype])


def filled(folder, view=0, **settings):
    """Rows of one view, all written, and their values."""
    rows = make_rows(folder, **settings)
    rows.reserve(view)
    values = torch.randn(IMAGES, *rows.shape).to(rows.dtype)
    rows.write(torch.arange(IMAGES), torch.full((IMAGES,), view), values)
    return rows, values


def read_again(rows, view=0):
    """Rows as read after reopening the files."""
    again = Rows(rows.folder, rows.key, rows.images, rows.shape, rows.dtype)
    return again.read(torch.arange(rows.images), torch.full((rows.images,), view))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (10,), (4, 4, 2)])
def test_written_rows_are_read_bit_identically(tmp_path, shape, dtype):
    rows = make_rows(tmp_path, shape, dtype)
    for view in (0, 7):
        rows.reserve(view)
    index, view = torch.tensor([3, 19, 0, 3]), torch.tensor([0, 7, 7, 7])
    values = torch.randn(4, *shape).to(rows.dtype)
    rows.write(index, view, values)
    got, known = make_rows(tmp_path, shape, dtype).read(index, view)
    assert known.all()
    assert got.dtype == rows.dtype
    assert torch.equal(got, values)
    _, known = rows.read(torch.tensor([4, 19, 0, 3]), torch.tensor([0, 0, 0, 8]))
    assert not known.any()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_file_never_gives_wrong_rows(tmp_path_factory, data):
    rows, values = filled(tmp_path_factory.mktemp("rows"))
    path = rows.path(0)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # duplicate a part
        size = data.draw(st.integers(1, len(content) // 2))
        start, to = (data.draw(st.integers(0, len(content) - size)) for _ in range(2))
        content[to : to + size] = content[start : start + size]
    path.write_bytes(content)
    got, known = read_again(rows)
    assert torch.equal(got[known], values[known])


@pytest.mark.parametrize("part", range(11))
def test_truncated_file_is_extended_and_lost_rows_are_invalid(tmp_path, part):
    rows, values = filled(tmp_path)
    path = rows.path(0)
    os.truncate(path, rows.file_size * part // 10)
    _, known = read_again(rows)
    assert not known.any() or part == 10  # too short to be mapped
    rows.reserve(0)
    assert path.stat().st_size == rows.file_size
    got, known = read_again(rows)
    assert known.sum() == IMAGES * part // 10
    assert torch.equal(got[known], values[known])


def test_row_at_the_wrong_position_is_invalid(tmp_path):
    rows, _ = filled(tmp_path)
    size = rows.file_size // IMAGES
    content = rows.path(0).read_bytes()
    rows.path(0).write_bytes(content[size:] + content[:size])
    assert not read_again(rows)[1].any()
    rows.path(1).write_bytes(content)
    assert not read_again(rows, view=1)[1].any()


WRITER = """
import sys, torch
from pathlib import Path
from kd_lightning.storage.rows import Rows
rows = Rows(Path(sys.argv[1]), {}, 50, (512,), torch.float32)
rows.reserve(0)
generator = torch.Generator().manual_seed(int(sys.argv[2]))
number = int(sys.argv[2])
print("ready", flush=True)
while True:
    number = (number + 2) % 10_000  # larger numbers would not be exact in float32
    index = torch.randperm(50, generator=generator)[:16]
    values = index[:, None] + torch.full((16, 512), number * 1000.0)
    rows.write(index, torch.zeros(16, dtype=torch.int64), values)
"""


def test_killed_concurrent_writers_leave_no_mixed_row(tmp_path):
    script = tmp_path / "writer.py"
    script.write_text(WRITER)
    rows, seen = Rows(tmp_path, {}, 50, (512,), torch.float32), 0
    for enough in (200, 400):
        writers = [processes.start(str(script), str(tmp_path), str(i)) for i in (0, 1)]
        try:
            while not all(writer.out for writer in writers):
                time.sleep(0.01)
            start = time.monotonic()  # for 0.4 seconds, or longer on a slow machine
            while (spent := time.monotonic() - start) < 0.4 or (seen <= enough and spent < 60):
                seen += check_whole(rows)
        finally:
            for writer in writers:
                writer.send_signal(signal.SIGKILL)
                writer.wait()
        seen += check_whole(rows)
    assert seen > 400


def check_whole(rows):
    """Check that every valid row is from a single writer; return their number."""
    got, known = rows.read(torch.arange(50), torch.zeros(50, dtype=torch.int64))
    assert (got[known] == got[known][:, :1]).all()
    assert torch.equal(got[known][:, 0] % 1000, torch.arange(50.0)[known])
    return int(known.sum())


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


# Through the command line.


def remembered(tmp_path):
    return {entry.folder.name for entry in stored(tmp_path / "outputs" / "teachers" / "remembered")}


@contextlib.contextmanager
def counting():
    """Number of images that the teacher processed, in training and in evaluation."""
    counts = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for kind, name in (("training", "answer"), ("evaluation", "__call__")):
            original = getattr(FrozenTeacher, name)

            def count(self, images, kind=kind, original=original):
                counts[kind] += len(images)
                return original(self, images)

            patch.setattr(FrozenTeacher, name, count)
        yield counts


@pytest.fixture
def asked():
    with counting() as counts:
        yield counts


SHAPES = 8  # images used to determine output shapes
SMALL = (*FOLDER, *TINY)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The folder of a distilled student, and what it asked its teacher; its caches are complete."""
    root = tmp_path_factory.mktemp("cached")
    place = f"data.root={write_folder(root / 'images')}", f"output_dir={root / 'outputs'}"
    with counting() as counts:
        found = api.run(*SMALL, *place, "method=combined")
    return Path(found["folder"]), counts


def student_of(folder):
    return (folder / "student.safetensors").read_bytes()


def test_second_training_uses_only_the_cache(train, tmp_path, asked, cached):
    folder, counts = cached
    assert counts == {"training": 2 * 33 + SHAPES, "evaluation": 12}
    shutil.copytree(folder.parents[2] / "teachers", tmp_path / "outputs" / "teachers")
    done = train("method=combined")
    assert done.code == 0, done.err
    assert asked == {"training": SHAPES}
    assert student_of(done.runs[0]) == student_of(folder)
    first = RunDirectory(folder).read_metrics()
    for key in ("agreement", "teacher_test_accuracy"):
        assert done.metrics[key] == first[key]
    assert sorted(name.split("-")[1] for name in remembered(tmp_path)) == [
        "attention", "evaluation", "logit",
    ]  # fmt: skip


def test_float32_cache_is_bit_identical(train, asked):
    """Of vectors, and of maps with several channels."""
    exact = (
        "method=combined", "+method.terms.vid={_target_: kd_lightning.losses.VID, weight: 1}",
        "trainer.precision=32-true", "trainer.max_epochs=1",
    )  # fmt: skip
    students = []
    for stored_as in ("remember.disk_gb=0", "remember.dtype=float32", "remember.dtype=float32"):
        asked.clear()
        done = train(*exact, stored_as)
        assert done.code == 0, done.err
        students.append(student_of(done.runs[0]))
    assert asked == {"training": SHAPES}
    assert students[0] == students[1] == students[2]


@pytest.mark.slow  # needs students that have learned
def test_rounding_does_not_reduce_accuracy(train):
    """Digits, 14 steps per epoch; the two students differ only in float16 targets."""
    command = (
        "method=combined", "data=digits", "student=small", "data.image_size=16",
        "data.padding=2", "optimizer.lr=0.05",
        "trainer.max_epochs=5", "trainer.precision=32-true", "trainer.accelerator=cpu",
        "teacher.model.channels=[16,32]", "teacher.model.hidden=32",
        "teacher.layers=[stage1,stage2]", "teacher.trainer.max_epochs=3",
        "student.model.channels=[16,32]", "student.model.hidden=32",
    )  # fmt: skip
    exact, rounded = (
        train(*command, setting, data=False, tiny=False)
        for setting in ("remember.disk_gb=0", "remember.dtype=float16")
    )
    assert (exact.code, rounded.code) == (0, 0), exact.err + rounded.err
    weights = [(done.runs[0] / "student.safetensors").read_bytes() for done in (exact, rounded)]
    assert weights[0] != weights[1]  # rounding has an effect
    assert exact.metrics["test_accuracy"] > 0.8
    for part in ("val_accuracy", "test_accuracy"):
        assert abs(exact.metrics[part] - rounded.metrics[part]) <= 0.01, part


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


def test_cache_decides_before_training_what_fits(train, tmp_path, asked, cached):
    """36 + 12 images of 3 logits or 8 x 8 attention maps: 700 bytes and 5 kB per view."""
    done = train("method=combined", "remember.disk_gb=8e-6")
    assert done.code == 0, done.err
    sentences = [line for line in done.err.splitlines() if "are not cached" in line]
    assert len(sentences) == 1
    assert "attention" in sentences[0]
    assert asked["training"] == 2 * 33 + SHAPES
    assert {name.split("-")[1] for name in remembered(tmp_path)} == {"logit", "evaluation"}
    assert student_of(done.runs[0]) == student_of(cached[0])
    asked.clear()
    assert train("method=logit").code == 0
    assert asked["training"] == SHAPES


def test_k_views_are_repeated_cyclically(train, tmp_path, asked):
    assert train("method=logit", "data.views=2", "trainer.max_epochs=3").code == 0
    assert asked["training"] == 2 * 33 + SHAPES
    views = {
        entry.folder.name.split("-")[1]: entry.views
        for entry in stored(tmp_path / "outputs" / "teachers" / "remembered")
    }
    assert views == {"logit": 2, "evaluation": 1}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepare a run in bfloat16, with the weights of a file as its teacher, and open its caches."""
    root = tmp_path_factory.mktemp("opened")
    given = (*SMALL, f"data.root={write_folder(root / 'images')}", f"output_dir={root}")
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = ConvNet([8, 16], hidden=16, num_classes=3, image_size=16).state_dict()
        torch.save(state, root / f"{seed}.pt")

    def prepare(*overrides, weights=0):
        base = [f"{owner}trainer.precision=bf16-mixed" for owner in ("", "+teacher.")]
        file = [] if weights is None else [f"teacher.checkpoint={root / str(weights)}.pt"]
        job = student.prepare(api.compose(*given, *base, *file, *overrides))
        if weights is not None:
            student.open_caches(job.module, job.plan, job.data, CPU)
        return job

    return prepare


@pytest.fixture(scope="module")
def opened(prepared):
    """The folder of the cache that a run opens."""

    @cache
    def folder(*overrides, method="attention", weights=0):
        job = prepared(f"method={method}", *overrides, weights=weights)
        (rows,) = job.module.cache.rows.values()
        return rows.folder

    return folder


OTHER_OUTPUTS = [
    "data.padding=1", "data.flip=false", "data.cutout=4", "data.view_seed=1",
    "data.val_fraction=0.2", "data.mean=[0.4,0.5,0.5]", "teacher.layers=[stage1]",
    "remember.dtype=bfloat16", "trainer.precision=32-true",
]  # fmt: skip
SAME_OUTPUTS = [
    "seed=3", "optimizer.lr=0.001", "student.model.channels=[4,6]",
    "+method.terms.attention.distance=norm", "data.eval_batch_size=7",
    "data.batch_size=11",
]  # fmt: skip


@pytest.mark.parametrize("override", OTHER_OUTPUTS + SAME_OUTPUTS)
def test_equal_outputs_share_a_cache(opened, override):
    assert (opened(override) == opened()) == (override in SAME_OUTPUTS)


def test_other_teachers_have_other_caches(opened, prepared):
    assert opened(weights=1) != opened()
    keys = [
        teacher_key(job.plan.teachers[0], job.data.fingerprint())
        for job in (
            prepared("method=logit", *training, weights=None)
            for training in ((), ("teacher.seed=1",), ("data.batch_size=11",))
        )
    ]
    assert keys[0] not in keys[1:]


def test_methods_share_the_caches_of_their_terms(opened, prepared):
    rows = prepared("method=combined").module.cache.rows
    assert {part.folder for part in rows.values()} == {opened(), opened(method="logit")}


def test_logit_terms_share_a_cache(opened):
    logits = opened(method="logit")
    assert logits != opened()
    assert opened(method="mlkd") == logits
    # A fixed name, so that existing caches remain valid.
    for term in (Logit, HardLabel, DKD, DIST, NKD, MLKD):
        assert _term_key(term()) == {"class": "kd_lightning.losses.logit.Logit"}


class Restless(FolderDataModule):
    """Images with random noise."""

    reproducible = False


def test_non_reproducible_views_are_not_cached(prepared, caplog):
    with caplog.at_level(logging.WARNING):
        job = prepared("method=logit", "data._target_=test_teacher_cache.Restless")
    assert "not reproducible" in caplog.text
    assert job.module.cache is None
    assert job.module.evaluation_cache is not None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("remember.disk_gb=-1", ["remember.disk_gb", "at least 0"]),
        ("remember.disk_gb=lots", ["remember.disk_gb", "lots"]),
        ("remember.dtype=int8", ["remember.dtype", "float16"]),
        ("data.views=0", ["views", "at least 1"]),
    ],
)
def test_invalid_cache_settings_are_rejected(prepared, override, words):
    with pytest.raises(InputError) as error:
        prepared("method=logit", override)
    assert all(word in str(error.value) for word in words), error.value
    assert len(str(error.value).splitlines()) == 1


def test_row_of_zeros_is_invalid(tmp_path):
    """A new file is all zeros, and targets may be zero."""
    rows = Rows(tmp_path, {}, images=300, shape=(3,), dtype=torch.float16)
    index = torch.arange(300)
    for number in (PLAIN, 0, 7):
        view = torch.full_like(index, number)
        rows.reserve(number)
        assert not rows.read(index, view)[1].any()
        rows.write(index, view, torch.zeros(300, 3, dtype=torch.float16))
        assert rows.read(index, view)[1].all()
        # The same numbers at the position of another image.
        file = rows.path(number)
        content = file.read_bytes()
        file.write_bytes(content[16:] + content[:16])
        assert not Rows(tmp_path, {}, 300, (3,), torch.float16).read(index, view)[1].any()


@pytest.mark.parametrize(("views", "warned"), [(1, True), (2, False)])
def test_warning_if_views_repeat_often(train, monkeypatch, views, warned):
    monkeypatch.setattr(student, "OFTEN", 1)
    done = train("method=none", f"data.views={views}")  # two epochs
    assert done.code == 0
    assert ("data.views=2" in done.err) == warned
