"""Printing to a terminal, file or pipe of any encoding; never raises."""

import argparse
import codecs
import os
import re
import sys
import unicodedata
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

_ASCII = {
    "±": "+-",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "…": "...",
    "ß": "ss",
}
_ERRORS = "kd_lightning.ascii"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but tabs and line ends


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: the closest ASCII replacement, else `?`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = ""
    for character in error.object[error.start : error.end]:
        plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        text += _ASCII.get(character) or plain or "?"
    return text, error.end


codecs.register_error(_ERRORS, _replace)


def console(error: bool = False) -> Console:
    """A rich console on standard output or standard error, for tables and progress bars."""
    stream = sys.stderr if error else sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    on_terminal = watched(error)
    return Console(
        file=stream,
        highlight=False,
        markup=False,
        emoji=False,
        force_terminal=on_terminal or None,
        width=None if on_terminal else 10_000,
    )


def watched(error: bool = False) -> bool:
    """Whether standard output (or standard error) is an interactive terminal that can redraw."""
    stream = sys.stderr if error else sys.stdout
    try:
        on_terminal = stream is not None and stream.isatty()
    except ValueError:  # closed
        return False
    return on_terminal and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def positive(text: str) -> int:
    """A whole number of at least 1, as `type` of an option of argparse."""
    number = int(text) if text.strip().isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return number


def say(what: str | Table, error: bool = False) -> None:
    """Print a line or a table to standard output or standard error.

    In a line, characters outside the stream's encoding are escaped, so that paths stay exact; in a
    table they are replaced by similar ones (`printable`). A broken pipe (`| head`) is ignored.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    out = console(error)
    if isinstance(what, str):
        text = _CONTROL.sub(lambda found: repr(found[0])[1:-1], f"{what}\n")
        text = text.replace("±", printable("±", error))
    else:
        with out.capture() as captured:
            out.print(what)
        text = "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(text: str, error: bool = False) -> str:
    """The text on one line, in characters that the stream can encode."""
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = "".join(c if c.isprintable() else " " for c in text)
    return text.encode(encoding, _ERRORS).decode(encoding, "replace")


def table_of(frame: "pd.DataFrame", title: str = "") -> Table:
    """Convert a data frame to a table, with methods and students left-aligned, numbers right.

    Ruled on a terminal, otherwise columns separated by spaces.
    """
    on_terminal = watched()
    table = Table(
        title=Text(printable(title), style="bold") if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD if on_terminal else None,
        pad_edge=on_terminal,
        header_style="bold",
    )
    for column in frame.columns:
        justify: Any = "left" if column in ("method", "student") else "right"
        table.add_column(Text(printable(str(column))), justify=justify, overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    return table


def fits(table: Table) -> bool:
    """Whether a table fits the width of the terminal."""
    out = console()
    return out.measure(table, options=out.options.update(max_width=10_000)).maximum <= out.width
