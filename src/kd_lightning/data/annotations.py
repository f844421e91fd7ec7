"""Text files of ImageNet and Tiny ImageNet: labels of validation images, and names of classes."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kd_lightning.errors import InputError
from kd_lightning.files import readable

WORDNET = re.compile(r"n\d{8}")  # ids of WordNet 3.0, as ImageNet names its classes

# `n01443537<tab>goldfish, Carassius auratus`: in Tiny ImageNet, and in Kaggle's copy of ImageNet.
SYNONYMS = ("words.txt", "LOC_synset_mapping.txt")


def read_annotations(path: Path) -> tuple[bytes, dict[str, str]]:
    """Read a file with a line per image: ``val_0.JPEG<tab>n03444034<tab>...``.

    Args:
        path: the file.

    Returns:
        Its content, and file name to class name.

    Raises:
        InputError: it cannot be read, a line has another form, or an image occurs twice.
    """
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{readable(path)} cannot be read: {error}") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        image, *rest = line.split("\t")
        if not image or not rest or not rest[0]:
            raise InputError(
                f"{readable(path)}, line {number}: expected the names of an image and of its "
                "class, separated by a tab"
            )
        if image in found:
            raise InputError(f"{readable(path)}, line {number}: {readable(image)} occurs twice")
        found[image] = unicodedata.normalize("NFC", rest[0].strip())  # as names of folders
    return content, found


def readable_names(root: Path, names: Sequence[str]) -> list[str]:
    """Names of classes for people: the first synonym of a WordNet id, if `root` has a list.

    A synonym of several classes (ImageNet has two cranes) is followed by the id.

    Args:
        root: folder of the data set.
        names: names of the class folders.

    Returns:
        As many names; those of the folders if there is no list, or not for this class.
    """
    wanted = {name: name for name in names if WORDNET.fullmatch(name)}
    for file in SYNONYMS:
        try:
            lines = (root / file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        for line in lines:
            wordnet_id, *rest = re.split(r"\s", line, maxsplit=1)
            if wordnet_id in wanted and rest and (first := rest[0].split(",")[0].strip()):
                wanted[wordnet_id] = readable(first)
    shown = [wanted.get(name, name) for name in names]
    count = Counter(shown)
    return [
        text if count[text] == 1 else f"{text} ({name})"
        for name, text in zip(names, shown, strict=True)
    ]
