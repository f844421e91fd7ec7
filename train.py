"""Train a student: `python train.py --help`."""

from kd_lightning.cli import main

if __name__ == "__main__":
    main()
