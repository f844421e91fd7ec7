"""Checks of the other machines of a training, before it costs anything."""

from pathlib import Path

from kd_lightning.config.nodes import Node
from kd_lightning.engine import group
from kd_lightning.errors import InputError
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows.assembly import build_data
from kd_lightning.workflows.jobs import Job


def check_nodes(job: Job, directory: RunDirectory) -> None:
    """Check that every other node sees the run's folder and has the same images.

    The images are downloaded or decoded there, if necessary, by one process of each node.

    Raises:
        InputError: a node does not; the message names it.
        RunError: a process is lost.
    """
    leader = group.leader()
    if leader is None or job.processes == 1:
        return
    known = leader.on_every_node(_prepare_node, job.plan.data.node, directory.path / "config.yaml")
    for host, images in known.items():
        if images != job.contents.images:
            raise InputError(f"the images on {host} differ from those of rank 0: copy them there")


def _prepare_node(data: Node, file: Path) -> str:
    """Load the images; return their fingerprint.

    Args:
        data: the data section.
        file: a file in the run's folder.

    Raises:
        InputError: the file is not visible, or the images cannot be loaded.
    """
    if not file.exists():
        raise InputError(
            f"output_dir is not shared: {file} does not exist; use a folder that all nodes see"
        )
    module = build_data(data)
    module.setup()
    return module.fingerprint()
