"""A wheel includes the configuration tree and runs outside the repository."""

import subprocess
import sys
import zipfile

from conftest import REPOSITORY, in_a_new_process


def test_installed_wheel_runs_from_any_directory(tmp_path):
    # Build from a copy, to keep the checkout clean.
    source = tmp_path / "source"
    tracked = ["pyproject.toml", "README.md", "LICENSE", "configs", "src"]
    source.mkdir()
    for name in tracked:
        subprocess.run(["cp", "-r", str(REPOSITORY / name), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    program = "import kd_lightning.cli as cli; print(cli.__file__); cli.main()"
    done = in_a_new_process(
        "-c", program, "method=logit", "--cfg", "job", cwd=outside,
        PYTHONPATH=str(tmp_path / "installed"),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.startswith(str(tmp_path / "installed"))
    assert "_target_: kd_lightning.losses.Logit" in done.out
