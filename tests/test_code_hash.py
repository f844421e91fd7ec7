"""Hashes of user code and of files: they change with the content, not with comments or times."""

import importlib
import os
import pkgutil
import shutil
import sys
import textwrap

import pytest
from user_modules import write_module

from kd_lightning.storage import identity as contents


def digest(own, text, helper="VALUE = 1\n"):
    write_module(own / "helpers.py", helper)
    write_module(own / "mine.py", text)
    return contents.source_sha256({"student": {"_target_": "mine.Net", "width": 4}})


NET_TEXT = """
    import helpers
    class Net:
        def forward(self, x):
            return x * helpers.VALUE
"""


def test_comments_and_formatting_do_not_change_the_code_hash(own):
    first = digest(own, NET_TEXT)
    commented = NET_TEXT.replace("return x", "'''Doc.'''  # why\n            return  x")
    assert digest(own, commented) == first
    assert digest(own, NET_TEXT.replace("x *", "x +")) != first
    assert digest(own, NET_TEXT, helper="VALUE = 2\n") != first  # imports are included


def test_code_hash_is_of_the_imported_version(own):
    write_module(own / "helpers.py", "VALUE = 1\n")
    write_module(own / "mine.py", textwrap.dedent(NET_TEXT))
    first = contents.source_sha256({"_target_": "mine.Net"})
    # The remaining runs of a grid use the imported version.
    (own / "mine.py").write_text(textwrap.dedent(NET_TEXT.replace("x *", "x +")))
    assert contents.source_sha256({"_target_": "mine.Net"}) == first
    importlib.reload(sys.modules["mine"])
    assert contents.source_sha256({"_target_": "mine.Net"}) != first


@pytest.mark.parametrize("file", ["__init__.py", "patches.py", "late.py"])
def test_code_hash_includes_package_init_and_late_imports(own, file):
    package = own / "helpers"
    package.mkdir()
    texts = {
        "__init__.py": "from . import patches\nSCALE = 1\n",
        "patches.py": "VALUE = 1\n",
        "late.py": "VALUE = 1\n",  # imported by a later function call
        "net.py": "class Net:\n    def forward(self, x):\n        from . import late\n",
    }
    for name, text in texts.items():
        (package / name).write_text(text)
    node = {"_target_": "helpers.net.Net"}
    first = contents.source_sha256(node)
    assert "helpers.late" not in sys.modules
    pkgutil.resolve_name("helpers.late")
    assert contents.source_sha256(node) == first
    for name in [name for name in sys.modules if name.split(".")[0] == "helpers"]:
        del sys.modules[name]
    (package / file).write_text(texts[file].replace("1", "2"))
    shutil.rmtree(package / "__pycache__", ignore_errors=True)
    assert contents.source_sha256(node) != first


def test_third_party_packages_are_identified_by_name():
    node = {"a": {"_target_": "torchvision.models.resnet18"}, "b": [{"_target_": "torch.nn.ReLU"}]}
    assert contents.source_sha256(node, {"_target_": "kd_lightning.models.ConvNet"}) is None


def test_code_hash_covers_an_installed_package_only_if_it_is_named(own, tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(contents, "_installed", lambda: (site.resolve(),))
    imported, named = set(), set()
    for value in (1, 2):
        (site / "installed_before.py").write_text(f"class Net:\n    value = {value}\n")
        sys.modules.pop("installed_before", None)
        imported.add(digest(own, "from installed_before import Net\nclass Net(Net): pass\n"))
        named.add(contents.source_sha256({"_target_": "installed_before.Net"}))
    assert (len(imported), len(named)) == (1, 2)
    sys.modules.pop("installed_before")


def test_code_hash_includes_hydra_get_class(own):
    write_module(own / "mine.py", "class Norm: pass\n")
    node = {"norm_layer": {"_target_": "hydra.utils.get_class", "path": "mine.Norm"}}
    first = contents.source_sha256(node)
    write_module(own / "mine.py", "class Norm: eps = 1\n")
    assert first is not None
    assert contents.source_sha256(node) != first


def test_files_passed_to_a_model_are_hashed_by_content(tmp_path):
    weights = tmp_path / "backbone.bin"
    weights.write_bytes(b"one")
    node = {"_target_": "torchvision.models.resnet18", "weights": str(weights)}
    first = contents.source_sha256(node)
    weights.write_bytes(b"two")
    assert contents.source_sha256(node) != first
    moved = tmp_path / "elsewhere" / "backbone.bin"
    moved.parent.mkdir()
    shutil.copy(weights, moved)
    assert contents.source_sha256({**node, "weights": str(moved)}) == contents.source_sha256(node)


def test_copy_with_preserved_mtime_is_detected(tmp_path):
    checkpoint, other = tmp_path / "a.pt", tmp_path / "b.pt"
    checkpoint.write_bytes(b"one")
    other.write_bytes(b"two")
    for path in (checkpoint, other):
        os.utime(path, (1e9, 1e9))
    config = {"data_dir": "data", "teacher": {"checkpoint": str(checkpoint)}}
    first = contents.stamps(config)
    assert contents.stamps(config) == first
    other.rename(checkpoint)
    assert contents.stamps(config) != first


def test_every_file_of_the_same_name_counts(tmp_path):
    files = [tmp_path / folder / "m.bin" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(b"before")
    first, second = map(str, files)
    target = "torchvision.models.resnet18"
    node = {"_target_": target, "x": first, "y": second}
    before = contents.source_sha256(node)
    assert contents.source_sha256({**node, "z": first}) == before  # the same file
    for file in files:
        file.write_bytes(b"after")
        assert contents.source_sha256(node) != before
        file.write_bytes(b"before")
