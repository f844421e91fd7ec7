"""Rows of the teacher-output cache: bit-identical or invalid, whatever happens to their files."""

import errno
import os
import signal
import time

import processes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_rows import IMAGES, make_rows

from kd_lightning.data.views import PLAIN
from kd_lightning.storage.rows import DTYPES, Rows


def filled(folder, view=0, **settings):
    """Rows of one view, all written, and their values."""
    rows = make_rows(folder, **settings)
    rows.reserve(view)
    values = torch.randn(IMAGES, *rows.shape).to(rows.dtype)
    rows.write(torch.arange(IMAGES), torch.full((IMAGES,), view), values)
    return rows, values


WORDS = 2 + 2  # of a row: the checksum, and three float16 numbers with their padding


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


@pytest.mark.parametrize(
    ("shape", "images", "limit", "most"),
    [((2**20,), 9, 2**22, 7), ((3,), 9000, 2**22, 8192), ((99,), 2, 9, 1)],
)
def test_wide_rows_are_checked_in_small_parts(tmp_path, monkeypatch, shape, images, limit, most):
    """The checksums need several temporary tensors of 8 bytes per word."""
    rows, check, sizes = make_rows(tmp_path, shape, images=images), Rows.valid, []
    rows.reserve(0)
    index = torch.arange(images)
    values = torch.rand(images, *shape).half()
    rows.write(index[1:], torch.zeros_like(index[1:]), values[1:])
    monkeypatch.setattr("kd_lightning.storage.rows.MOST_WORDS", limit)
    monkeypatch.setattr(
        Rows, "valid", lambda self, part, *of: sizes.append(len(part)) or check(self, part, *of)
    )
    loaded = rows.load(0, torch.device("cpu"))
    assert max(sizes) == most
    assert sum(sizes) == images
    assert loaded.known.wait().tolist() == [False, *[True] * (images - 1)]
    assert torch.equal(loaded.values(index)[1:], values[1:])


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


def written_rows(folder):
    """Rows of three images, their indices and view numbers, and the content of the file."""
    rows = make_rows(folder, images=3)
    rows.reserve(5)
    index, view = torch.arange(3), torch.full((3,), 5)
    rows.write(index, view, torch.randn(3, 3).half())
    content = torch.from_file(str(rows.path(5)), size=3 * WORDS, dtype=torch.int32)
    return rows, index, view, content.view(3, WORDS)


def test_a_changed_bit_anywhere_in_a_row_is_detected(tmp_path):
    rows, index, view, content = written_rows(tmp_path)
    assert rows.valid(content, index, view).all()
    for word in range(WORDS):
        for bit in range(32):
            changed = content.clone()
            changed[:, word] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
            assert not rows.valid(changed, index, view).any(), (word, bit)


def test_a_row_of_another_image_or_view_is_not_valid(tmp_path):
    rows, index, view, content = written_rows(tmp_path)
    assert not rows.valid(content, index.roll(1), view).any()
    assert not rows.valid(content, index, view + 1).any()
    assert not rows.valid(torch.zeros_like(content), index, view).any()


def test_a_truncated_file_that_cannot_be_extended_is_kept(tmp_path, monkeypatch):
    """Neither removed nor left with blocks that are not allocated, whose use would kill."""
    rows, _ = filled(tmp_path)
    half = rows.file_size // 2
    os.truncate(rows.path(0), half)

    def full(file, *_):
        os.ftruncate(file, rows.file_size)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    for view, expected in ((0, half), (1, None)):
        with pytest.raises(OSError, match="full"):
            make_rows(tmp_path).reserve(view)
        path = rows.path(view)
        assert (path.stat().st_size if path.exists() else None) == expected
