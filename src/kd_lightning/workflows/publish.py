"""Publication of a run's student on the Hugging Face Hub, with its model card."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from safetensors import SafetensorError, safe_open

from kd_lightning.config.published import published_config, published_metrics
from kd_lightning.errors import InputError, RunError
from kd_lightning.reports.card import CardOptions, model_card
from kd_lightning.storage.run_directory import RunDirectory

WEIGHTS = "student.safetensors"


def publish(
    run_dir: str | Path,
    repository: str,
    options: CardOptions | None = None,
    files: Sequence[str | Path] = (),
    private: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a student to the Hub: weights, configuration, metrics, model card, further files.

    Local paths are removed from configuration and metrics. The repository is created if it does not
    exist; files of the same names are replaced, in one commit.

    Args:
        run_dir: folder of the run.
        repository: ``OWNER/NAME``.
        options: of the model card.
        files: further files, such as exported ones.
        private: whether a new repository is private.
        endpoint: address of the Hub; None: that of ``HF_ENDPOINT``, by default huggingface.co.
        token: None: that of ``HF_TOKEN``, or of ``hf auth login``.

    Returns:
        The address of the commit.

    Raises:
        InputError: a file is missing, or huggingface_hub is not installed.
        RunError: the Hub cannot be reached or rejects the upload.
    """
    paths = {Path(file).name: Path(file) for file in files}
    options = replace(options or CardOptions(), repository=repository, files=tuple(paths))
    contents = _contents(RunDirectory(run_dir), options)
    for name in paths:
        if not paths[name].is_file():
            raise InputError(f"--file {paths[name]} is not a file")
        if name in contents or len(paths) < len(files):
            raise InputError(f"--file {paths[name]}: two files would be published as {name}")
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ModuleNotFoundError as error:
        raise InputError("huggingface_hub is missing: pip install -e '.[hub]'") from error
    additions = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in {**contents, **paths}.items()
    ]
    hub = HfApi(endpoint=endpoint, token=token)
    try:
        hub.create_repo(repository, private=private or None, exist_ok=True)
        commit = hub.create_commit(
            repository, additions, commit_message="Upload the student and its model card"
        )
    except Exception as error:  # the errors of its HTTP client have no common base
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(f"{repository} could not be published on the Hub: {reason}") from error
    return str(commit.commit_url)


def _contents(directory: RunDirectory, options: CardOptions) -> dict[str, bytes | Path]:
    """The published files by name, without those of the user."""
    card = model_card(directory.path, options)
    weights = directory.path / WEIGHTS
    if not weights.is_file():
        raise InputError(f"{directory.path} has no {WEIGHTS}")
    try:
        safe_open(weights, framework="pt")  # a link may lead to any other file
    except SafetensorError as error:
        raise InputError(f"{weights} is damaged: {error}") from error
    config = yaml.safe_dump(published_config(directory.read_config()), sort_keys=False)
    metrics = json.dumps(published_metrics(directory.read_metrics()), indent=2)
    return {
        "README.md": card.encode(),
        "config.yaml": config.encode(),
        "metrics.json": f"{metrics}\n".encode(),
        WEIGHTS: weights,
    }
