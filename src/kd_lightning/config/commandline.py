"""Preprocessing of the command line for Hydra: options in any position, ``~`` expansion, and
error messages that show the correct spelling.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException

from kd_lightning.config.overrides import find_key, no_such_choice, override_parser
from kd_lightning.config.tree import tree_folder
from kd_lightning.errors import InputError

KEY = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@:-]*", re.ASCII)
BRACKETS = {"{": "}", "[": "]"}
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2212"  # typographic replacements of - and --


def prepare(arguments: Sequence[str]) -> list[str]:
    """Reorder the arguments for Hydra: overrides, then options.

    Raises:
        InputError: an argument is neither; the message shows the correct spelling.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise InputError(f"the command line cannot be read: {message}")

    parser.error = refuse  # type: ignore[method-assign]
    for argument in arguments:
        if argument[0:1] and argument[0] in DASHES:
            raise InputError(f"{argument} begins with a typographic dash; type a plain - instead")
    words = [expand_home(argument) for argument in arguments]
    known, unknown = parser.parse_known_intermixed_args(words)
    for option in unknown:
        if option.startswith("-"):
            raise InputError(unknown_option(option, words))
    for override in known.overrides:
        words.remove(override)
    return [*check_overrides(known.overrides), *words]


def check_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides, with ``~`` expanded, if Hydra can parse all of them.

    Raises:
        InputError: one cannot be parsed; the message shows the correct spelling.
    """
    overrides = [expand_home(override) for override in overrides]
    for number, override in enumerate(overrides):
        key, sign, value = override.partition("=")
        if not sign and not override.startswith("~"):
            raise InputError(_missing_sign(overrides, number))
        if KEY.fullmatch(key.strip()) and key != key.strip():
            raise InputError(_no_spaces(f"{key.strip()}={value.strip()}"))
        if not KEY.fullmatch(key):
            hint = "; write the whole list: KEY=[A,B]" if key.endswith("]") else ""
            raise InputError(
                f"the command line cannot be read: {override!r} is not KEY=VALUE{hint}"
            )
        if _parsed(override) is None:
            raise InputError(_unreadable(override, overrides[number + 1 :]))
    return overrides


def expand_home(word: str) -> str:
    """Expand `KEY=~/x` to `KEY=/home/me/x`.

    Raises:
        InputError: there is no such home folder.
    """
    key, sign, value = word.partition("=")
    if not sign or not value.startswith("~"):
        return word
    try:
        parts = [str(Path(part).expanduser()) for part in value.split(",")]
    except RuntimeError as error:  # `~other/x`, without such a user
        raise InputError(f"{word}: this home folder is not known; write the whole path") from error
    expanded = f"{key}={','.join(parts)}"
    if key.startswith("-") or len(parts) > 1 or _parsed(expanded) is not None:
        return expanded
    return f"{key}={_quoted(parts[0])}"


def unknown_option(option: str, words: Sequence[str]) -> str:
    """Error message for an unknown option, which is usually a key written with dashes."""
    name, _, value = option.lstrip("-").partition("=")
    if not value and option in words:
        rest = list(words)[list(words).index(option) + 1 :]
        value = next((word for word in rest if "=" not in word and word[0:1] != "-"), "")
    with initialize_config_dir(tree_folder(), version_base="1.3"):
        key = find_key(compose("train"), name) if len(name) > 1 else None
    option = option.partition("=")[0]
    if key:
        return f"there is no option {option}; did you mean {key}={value or 'VALUE'}?"
    return f"there is no option {option}; settings are written KEY=VALUE, see --help"


def _missing_sign(words: Sequence[str], number: int) -> str:
    """Error message for a word without an equals sign."""
    word = words[number]
    before = words[number - 1] if number else ""
    after = words[number + 1] if number + 1 < len(words) else ""
    if after.startswith("="):
        rest = "" if after != "=" else "".join(words[number + 2 : number + 3])
        return _no_spaces(f"{word}{after}{rest}")
    if before.endswith("="):
        return _no_spaces(f"{before}{word}")
    if word in ("help", "version"):
        return f"{word} is not KEY=VALUE; did you mean --{word}?"
    if re.fullmatch(r"\w+/?\w+", word):
        pattern = f"{word}.yaml" if "/" in word else f"*/{word}.yaml"
        for path in sorted(Path(tree_folder()).glob(pattern)):
            if path.parent.name != "base":
                return f"{word} is not KEY=VALUE; did you mean {path.parent.name}={path.stem}?"
    if re.fullmatch(r"[a-z_.]+:[^/\\].*", word):
        return f"{word} must be written {word.replace(':', '=', 1)}"
    # Either the second half of a path with a space, or KEY VALUE.
    part_of_path = number > 0 and ("/" in before or "\\" in before or not KEY.fullmatch(word))
    if KEY.fullmatch(word) and after and "=" not in after and not part_of_path:
        return f"{word} {after} must be written {word}={after}"
    hint = f"; if it belongs to the previous word: {_fitting(before, word)}" if number else ""
    return f"{word} is not KEY=VALUE{hint}"


def _no_spaces(meant: str) -> str:
    return f"there must be no spaces around the = in {meant}"


def _fitting(before: str, word: str) -> str:
    key, _, value = before.partition("=")
    return in_shell(key, f"{value} {word}")


def _unreadable(override: str, following: Sequence[str]) -> str:
    """Error message for an override that Hydra's grammar rejects."""
    key, _, value = override.partition("=")
    key, value = key.strip(), value.strip()
    if value[0:1] in BRACKETS and not value.endswith(BRACKETS[value[0]]):
        for end, word in enumerate(following, 1):
            whole = " ".join([value, *following[:end]])
            if word.endswith(BRACKETS[value[0]]) and _parsed(f"{key}={whole}") is not None:
                return f"the shell splits values at spaces, so quote: {key}={shlex.quote(whole)}"
        return f"{override} has no closing {BRACKETS[value[0]]}"
    if value.startswith("=") and _parsed(f"{key}={value.lstrip('=')}") is not None:
        return f"{override} cannot be read: write {key}={value.lstrip('=')}"
    if value[0:1] in BRACKETS:
        try:
            text = hydra_text(yaml.safe_load(value))
        except yaml.YAMLError:
            text = ""
        if text and _parsed(f"{key}={text}") is not None:
            return f"{override} cannot be read: write {key}={shlex.quote(text)}"
    if value[0:1] in ("'", '"') or value[-1:] in ("'", '"'):
        value = value.strip("'\"")
    written = in_shell(key, value)
    why = " (quoted for the shell, and within that for Hydra)" if '"' in written else ""
    return f"{override} cannot be read: write {written}{why}"


def in_shell(key: str, value: str) -> str:
    """`KEY=VALUE`, quoted for the shell and for Hydra."""
    plain = _parsed(f"{key}={value}")
    fits = plain is not None and not plain.is_sweep_override() and plain.value() == value
    return f"{key}={shlex.quote(value if fits else _quoted(value))}"


def _quoted(value: str) -> str:
    return QuotedString(value, Quote.double).with_quotes()


def hydra_text(value: Any) -> str:
    """Format a value in Hydra's override grammar."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {hydra_text(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(hydra_text, value)) + "]"
    if isinstance(value, str):
        plain = _parsed(f"x={value}")
        return value if plain is not None and plain.value() == value != "" else _quoted(value)
    return "null" if value is None else str(value)


def _parsed(override: str) -> Override | None:
    try:
        return override_parser().parse_overrides([override])[0]
    except (HydraException, ValueError, TypeError):
        return None


def composition_error(error: Exception) -> str:
    """Summarise a composition error, of Hydra or of YAML, in one sentence."""
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark) is not None:
        return f"{mark.name}, line {mark.line + 1}: {error.problem}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return no_such_choice(group, choice, error.options)
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        lines += [line.strip() for line in str(cause).splitlines() if line.strip()]
        cause = cause.__cause__
    text = lines[0] if lines else type(error).__name__
    if found := re.match(r"Ambiguous value for argument '(.*)'$", text):
        key, _, value = found[1].partition("=")
        return (
            f"{found[1]} has several values: train.py sweeps over them with -m; or write "
            f"{key}=[{value}] for a list, {in_shell(key, value)} for one string"
        )
    if found := re.search(r"interpolation: Key '(\w+)' is not in struct", text):
        return f"{found[1]} cannot be removed: other settings refer to it"
    if found := re.match(r"Multiple values for (\S+?)\. ", text):
        return f"{found[1]} already exists: omit the +"
    return "; ".join(line for line in dict.fromkeys(lines[:2]) if not line.endswith(":"))
