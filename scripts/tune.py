"""Search temperature, weights and learning rate on the validation images with Optuna.

python scripts/tune.py --trials 30 method=logit student=small trainer.max_epochs=15

Started again it goes on; started several times at once, the workers share the study.
"""

import argparse
import shlex

from kd_lightning.errors import InputError, RunError
from kd_lightning.files import find_own_packages
from kd_lightning.startup import importing, run_script
from kd_lightning.terminal import positive


def main() -> None:
    """Read the command line, search, print the best."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    parser.add_argument(
        "--trials", type=positive, default=30, help="total number of trials of the study"
    )
    parser.add_argument("--space", action="append", default=[], metavar="KEY=LOW:HIGH[:log]")
    parser.add_argument("--storage", help="URL of a database; by default SQLite in output_dir")
    parser.add_argument("--study", help="name; by default from the configuration")
    arguments = parser.parse_intermixed_args()
    find_own_packages()
    try:
        with importing():
            from kd_lightning.workflows.tune import override, parse_range, tune
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is missing: pip install -e '.[tune]'") from error
    from hydra.errors import HydraException

    from kd_lightning.config.commandline import composition_error
    from kd_lightning.engine.quiet import quiet_lightning
    from kd_lightning.reports.summary import percent

    quiet_lightning()
    try:
        space = dict(parse_range(text) for text in arguments.space)
        study = tune(
            arguments.overrides, arguments.trials, arguments.storage, space, arguments.study
        )
        best = study.best_trial
    except HydraException as error:
        raise InputError(composition_error(error)) from error
    except ValueError as error:
        raise RunError(str(error)) from error
    assert best.value is not None  # a completed trial
    chosen = [override(key, value) for key, value in best.params.items()]
    print(
        f"{len(study.trials)} trials; best on validation {percent(best.value)}, trial {best.number}"
    )
    print(shlex.join([*arguments.overrides, *chosen]))


if __name__ == "__main__":
    run_script(main)
