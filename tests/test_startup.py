"""Start and end of a process: nothing that the interpreter does at its end is left out."""

import errno
import gc
import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import FOLDER, TINY, in_a_new_process

from kd_lightning import startup
from kd_lightning.errors import InputError, RunError
from kd_lightning.startup import importing

END = """
    import atexit, sys, threading, time
    from kd_lightning.startup import run_process

    def late():
        time.sleep(0.2)
        print("thread")

    def main():
        atexit.register(print, "atexit")
        threading.Thread(target=late).start()
        print("main")
        {end}

    run_process(main)
    print("not reached")
"""


@pytest.mark.parametrize(
    ("end", "code"), [("pass", 0), ("sys.exit(3)", 3), ("sys.exit()", 0), ("sys.exit('no')", 1)]
)
def test_threads_and_exit_handlers_finish_before_the_end(tmp_path, end, code):
    script = tmp_path / "end.py"
    script.write_text(textwrap.dedent(END.format(end=end)))
    done = in_a_new_process(str(script), fresh=True)
    assert done.code == code
    assert done.out == "main\nthread\natexit\n"
    assert done.err == ("no\n" if end == "sys.exit('no')" else "")


def test_open_files_are_complete(tmp_path):
    script = tmp_path / "end.py"
    opened = "; ".join(
        f"globals()['f{n}'] = open({str(tmp_path / str(n))!r}, {mode!r}); f{n}.write({text!r})"
        for n, (mode, text) in enumerate([("w", "text"), ("wb", b"bytes"), ("w+b", b"both")])
    )
    script.write_text(textwrap.dedent(END.format(end=opened)))
    assert in_a_new_process(str(script), fresh=True).code == 0
    assert [(tmp_path / str(n)).read_text() for n in range(3)] == ["text", "bytes", "both"]


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [("raise KeyboardInterrupt", 130, "stopped by Ctrl-C\n"),
     ("from kd_lightning.errors import Stopped; raise Stopped(15)", 143, "stopped by SIGTERM"),
     ("sys.exit(2**40 + 1)", 1, "")],
)  # fmt: skip
def test_interruption_ends_with_a_sentence(tmp_path, end, code, said):
    script = tmp_path / "end.py"
    script.write_text(textwrap.dedent(END.format(end=end)))
    done = in_a_new_process(str(script), fresh=True)
    assert done.code == code
    assert done.err.startswith(said)
    assert done.err.count("\n") == bool(said)
    assert done.out.endswith("atexit\n")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("no such run"), 2, "error: no such run\n"),
        (RunError("diverged"), 1, "error: diverged\n"),
        (OSError(errno.ENOSPC, "full", "a/b"), 1, "error: a/b: full\n"),
        (OSError(errno.ENOSPC, "full"), 1, "error: full\n"),
        (OSError("no driver"), 1, "error: no driver\n"),
    ],
)
def test_errors_of_scripts_are_one_sentence(monkeypatch, capsys, error, code, said):
    def main():
        raise error

    # Otherwise pytest would be the program that ends, unless its workers run the tests.
    monkeypatch.setattr(startup, "_is_program", lambda frame: False)
    with pytest.raises(SystemExit) as end:
        startup.run_script(main)
    assert end.value.code == code
    assert capsys.readouterr().err == said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
@pytest.mark.parametrize(
    ("output", "end", "code"),
    [(">/dev/full", "", 1), (">/dev/full", "sys.exit()", 1), (">/dev/full", "sys.exit(3)", 3),
     ("2>/dev/full", "", 0), (">&-", "", 0), ("| head -c 5", "", 0)],
)  # fmt: skip
def test_output_that_cannot_be_written(tmp_path, output, end, code):
    script = tmp_path / "end.py"
    end = f"print('x' * 10**6); print('y' * 10**6, file=sys.stderr); {end}"
    script.write_text(textwrap.dedent(END.format(end=end)))
    command = f"set -o pipefail; {sys.executable} {script} {output}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    said = "error: standard output cannot be written: No space left on device\n"
    assert (said in done.stderr) == (code == 1)


@pytest.mark.parametrize("tool", ["cProfile", "trace", "pdb"])
def test_tools_that_run_a_program_go_on_after_it(tmp_path, tool):
    script = tmp_path / "end.py"
    script.write_text(textwrap.dedent(END.format(end="")))
    options = {"cProfile": (), "trace": ("--listfuncs",), "pdb": ("-c", "continue", "-c", "quit")}
    done = in_a_new_process("-m", tool, *options[tool], str(script), fresh=True)
    assert done.code == 0
    assert "not reached" in done.out  # by `python end.py`
    expected = {"cProfile": "function calls", "trace": "functions called", "pdb": "finished"}
    assert expected[tool] in done.out


def test_a_module_is_a_program_too(tmp_path):
    (tmp_path / "end.py").write_text(textwrap.dedent(END.format(end="")))
    done = in_a_new_process(
        "-m", "end", fresh=True, cwd=tmp_path, PYTHONPATH=os.pathsep.join(sys.path)
    )
    assert done.code == 0
    assert done.out == "main\nthread\natexit\n"


def test_other_exceptions_are_reported(tmp_path):
    script = tmp_path / "end.py"
    script.write_text(textwrap.dedent(END.format(end="raise OSError('here')")))
    done = in_a_new_process(str(script), fresh=True)
    assert done.code == 1
    assert "OSError: here" in done.err


@pytest.mark.slow  # new interpreters
@pytest.mark.parametrize(
    "processes", [(), ("trainer.devices=2",), ("-m", "hydra/launcher=joblib", "seed=0,1")]
)
def test_no_library_reports_leaks(tmp_path, folder, processes):
    """nanobind does if its types are still there at the interpreter's end, also in workers."""
    done = in_a_new_process(
        "train.py", *FOLDER, f"data.root={folder}", f"output_dir={tmp_path}", *TINY, *processes,
        "method=none", f"data_dir={tmp_path}/data", fresh=True,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "leak" not in done.err


@pytest.mark.slow  # a new interpreter
def test_no_costly_package_is_imported_before_the_first_step():
    script = """
        import sys, unittest.mock
        import kd_lightning.engine.preload
        from kd_lightning import api
        from lightning.pytorch import Trainer

        def fit(*_, **__):
            costly = {"sklearn", "scipy.optimize", "scipy.signal", "seaborn"}
            print(costly & {*sys.modules})
            sys.exit()

        with unittest.mock.patch.object(Trainer, "fit", fit):
            api.run("method=none", "data=digits")
    """
    done = in_a_new_process("-c", textwrap.dedent(script), fresh=True)
    assert done.out.endswith("set()\n"), done.err


@pytest.mark.parametrize("leaves_memory", [True, False])
def test_collector_skips_what_is_imported(monkeypatch, leaves_memory):
    monkeypatch.setattr(startup, "_leaves_memory", leaves_memory)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(gc, "freeze", lambda: calls.append("freeze"))
    calls = []
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert calls == ["freeze"] * leaves_memory


def test_collector_is_not_paused_if_torch_is_imported():
    with importing():
        assert gc.isenabled()


def test_collector_runs_again_after_a_failed_import(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


@pytest.fixture
def marking(tmp_path, monkeypatch):
    """A package that imports modules on demand, as SciPy does; one marks that it was imported."""
    package = tmp_path / "marking"
    (package / "costly").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import importlib\ndef __getattr__(name): return importlib.import_module(f'marking.{name}')"
    )
    (package / "costly" / "__init__.py").write_text(
        "import marking; marking.done = True; of_it = 3"
    )
    (package / "costly" / "deeper.py").write_text("below = 4")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("marking")
    for name in [name for name in sys.modules if name.partition(".")[0] == "marking"]:
        del sys.modules[name]


def test_module_that_nobody_uses_is_not_imported(marking):
    with startup._unused("marking.costly", given=5):
        import marking.costly

        assert marking.costly.given == 5
        assert not hasattr(marking.costly, "__file__")  # `inspect` asks all modules
    assert "done" not in vars(marking)
    assert "marking.costly" not in sys.modules
    assert importlib.import_module("marking.costly").of_it == 3


@pytest.mark.parametrize(
    "use",
    [
        "from marking.costly import of_it",
        "import marking.costly.deeper; of_it = marking.costly.of_it",
        "from marking.costly.deeper import below; of_it = below - 1",
        "import marking.costly as it; of_it = it.of_it",
    ],
)
def test_module_is_imported_when_it_is_used(marking, use):
    found = {}
    with startup._unused("marking.costly", given=5):
        exec(use, found)
    assert marking.done
    assert found["of_it"] == 3
    assert sys.modules["marking.costly"].of_it == 3


def test_module_that_is_imported_already_is_left_alone(marking):
    costly = importlib.import_module("marking.costly")
    with startup._unused("marking.costly", given=5):
        assert sys.modules["marking.costly"] is costly
    assert sys.modules["marking.costly"] is costly
    assert not hasattr(costly, "given")
