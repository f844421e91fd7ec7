"""Modules of a user, as a new process imports them."""

import shutil
import sys
import textwrap


def write_module(path, text):
    path.write_text(textwrap.dedent(text))
    # As in a new process: otherwise Python would use the imported version.
    for name in ("mine", "helpers"):
        sys.modules.pop(name, None)
    shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
