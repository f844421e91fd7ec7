"""Train a student: `python train.py --help`."""

from kd_lightning.cli import command

if __name__ == "__main__":
    command()
