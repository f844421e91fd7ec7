"""Folders of runs for reports, without a training, and one cell of their summary."""

import json

import yaml

PARAMETERS = {"small": 530_090, "medium": 2_117_962}


def write_run(folder, method, student, seed, test, status="finished", **metrics):
    run = folder / f"{method}-{student}-s{seed}"
    run.mkdir(parents=True)
    values = {
        "status": status, "name": run.name, "setting": "set", "method": method,
        "student": student, "seed": seed, "teacher": "convnet", "data": "digits",
    }  # fmt: skip
    if status == "finished":
        values |= {
            "parameters": PARAMETERS[student], "compression_ratio": 4.0, "val_accuracy": test,
            "test_accuracy": test, "teacher_test_accuracy": None if method == "none" else 0.9,
            "teacher_val_accuracy": None if method == "none" else 0.91,
            "teacher_parameters": 4_000_000, "agreement": None if method == "none" else 0.8,
            "epochs": 2, "train_seconds": 3.0,
        }  # fmt: skip
        (run / "history.csv").write_text("epoch,val_accuracy\n1,0.5\n2,0.6\n")
        (run / "confusion.csv").write_text("cat,dog\n8,2\n1,9\n")
    (run / "metrics.json").write_text(json.dumps({**values, **metrics}))
    return run


def write_config(run, seed=0, **changed):
    """The settings of a run, with some dotted keys changed."""
    config = {
        "seed": seed, "output_dir": f"somewhere/{seed}", "data_dir": "data", "name": run.name,
        "data": {"name": "digits", "batch_size": 64, "seed": seed, "padding": 3},
        "teacher": {"name": "convnet", "layers": ["a", "b"], "model": {"hidden": 8}},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9},
        "trainer": {"max_epochs": 2, "precision": "auto"},
    }  # fmt: skip
    for key, value in changed.items():
        *path, name = key.split("__")
        node = config
        for part in path:
            node = node.setdefault(part, {})
        node[name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return run


def cell(cells, method, student):
    (row,) = cells[(cells["method"] == method) & (cells["student"] == student)].itertuples()
    return row
