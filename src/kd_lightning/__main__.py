"""Train a student: `python -m kd_lightning --help`, the same as `python train.py --help`."""

from kd_lightning.cli import command

if __name__ == "__main__":
    command()
