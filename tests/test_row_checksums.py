"""The checksum of a row of the teacher-output cache covers every bit of it."""

import torch

from kd_lightning.storage.rows import Rows

WORDS = 2 + 2  # the checksum, and three float16 numbers with their padding


def test_a_changed_bit_anywhere_in_a_row_is_detected(tmp_path):
    rows = Rows(tmp_path, {"for": "a test"}, 3, (3,), torch.float16)
    rows.reserve(5)
    index, view = torch.arange(3), torch.full((3,), 5)
    rows.write(index, view, torch.randn(3, 3).half())
    content = torch.from_file(str(rows.path(5)), size=3 * WORDS, dtype=torch.int32).view(3, WORDS)
    assert rows.valid(content, index, view).all()
    for word in range(WORDS):
        for bit in range(32):
            changed = content.clone()
            changed[:, word] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
            assert not rows.valid(changed, index, view).any(), (word, bit)


def test_a_row_of_another_image_or_view_is_not_valid(tmp_path):
    rows = Rows(tmp_path, {"for": "a test"}, 3, (3,), torch.float16)
    rows.reserve(5)
    index, view = torch.arange(3), torch.full((3,), 5)
    rows.write(index, view, torch.ones(3, 3).half())
    content = torch.from_file(str(rows.path(5)), size=3 * WORDS, dtype=torch.int32).view(3, WORDS)
    assert not rows.valid(content, index.roll(1), view).any()
    assert not rows.valid(content, index, view + 1).any()
    assert not rows.valid(torch.zeros_like(content), index, view).any()
