"""Hyper-parameter search: on validation, resumable, with clear errors."""

import json
import shlex

import pytest
from conftest import TINY, write_folder

from kd_lightning import api
from kd_lightning.errors import InputError, RunError

tuning = pytest.importorskip("kd_lightning.workflows.tune")


@pytest.fixture
def overrides(tmp_path):
    images = write_folder(tmp_path / "images")
    return [
        *TINY, "method=logit", "data=folder", f"data.root={images}", "data.image_size=16",
        "data.padding=2", "data.batch_size=16", f"output_dir={tmp_path / 'outputs'}",
        f"data_dir={tmp_path / 'data'}", "trainer.max_epochs=1",
    ]  # fmt: skip


def test_study_uses_the_method_space_and_resumes(overrides, tmp_path):
    study = tuning.tune(overrides, trials=2)
    assert len(study.trials) == 2
    assert set(study.best_params) == {
        "optimizer.lr", "method.terms.logit.temperature", "method.terms.logit.weight",
        "method.terms.cross_entropy.weight",
    }  # fmt: skip
    # The first trial is the configuration.
    assert study.trials[0].params["method.terms.logit.temperature"] == 4.0
    for trial in study.trials:
        assert 1 <= trial.params["method.terms.logit.temperature"] <= 20
        assert 0 <= trial.value <= 1
        assert trial.intermediate_values == {1: trial.value}
    assert len(tuning.tune(overrides, trials=3).trials) == 3
    assert len(tuning.tune(overrides, trials=3).trials) == 3
    # The test images are never used.
    trials = list((tmp_path / "outputs").glob("tuning/**/metrics.json"))
    assert len(trials) == 3
    for path in trials:
        metrics = json.loads(path.read_text())
        assert metrics["status"] == "finished"
        assert "val_accuracy" in metrics
        tested = {key: metrics.get(key) for key in ("test_accuracy", "test_accuracy_at_best")}
        assert not any(tested.values())
        assert not (path.parent / "confusion.csv").exists()
    # All trials share one teacher.
    assert len(list((tmp_path / "outputs").rglob("teacher.safetensors"))) == 1


@pytest.fixture
def trained(monkeypatch):
    """The trials' configurations and folders, which are recorded instead of trained."""
    seen = []

    def run(config, place, **_):
        seen.append((config, place))
        return {"val_accuracy": len(seen) / 10}

    monkeypatch.setattr(tuning, "run", run)
    return seen


def test_every_configuration_has_a_study_of_its_own(overrides, trained):
    tuning.tune(overrides, trials=1)
    other = tuning.tune([*overrides, "student.model.hidden=2", "seed=5"], trials=1)
    assert [config["seed"] for config, _ in trained] == [0, 5]
    assert [config["student"]["model"]["hidden"] for config, _ in trained] == [8, 2]
    assert other.best_value == 0.2
    tuning.tune([*overrides, "pictures=true"], trials=1)  # does not change the result
    assert len(trained) == 2


def test_study_of_another_configuration_is_refused(overrides, trained):
    for _ in range(2):
        tuning.tune(overrides, trials=1, name="mine")
    assert len(trained) == 1
    with pytest.raises(InputError, match="the study mine is of another configuration"):
        tuning.tune([*overrides, "student.model.hidden=2"], trials=1, name="mine")


def test_space_belongs_to_the_study(overrides, trained):
    space = {"optimizer.lr": tuning.Range(0.01, 0.02)}
    studies = [tuning.tune(overrides, 1, space=given) for given in (None, space, space)]
    assert [len(study.trials) for study in studies] == [1, 1, 1]
    names = [study.study_name for study in studies]
    assert names[0] != names[1] == names[2]


@pytest.mark.parametrize(
    ("key", "said"),
    [("optimizer.lrr", "did you mean optimizer.lr"), ("trainer.accelerator", "not a number"),
     ("data.flip", "data.flip"), ("student.name", "student.name")],
)  # fmt: skip
def test_space_of_keys_without_a_number_is_refused(overrides, trained, key, said):
    with pytest.raises(InputError, match=said):
        tuning.tune(overrides, 1, space={key: tuning.Range(0.1, 1.0)})


@pytest.mark.parametrize("storage", ["sqlite:////proc/x/o.db", "foo"])
def test_unusable_storage_is_one_sentence(overrides, trained, storage):
    with pytest.raises(InputError, match=f"the studies in {storage} cannot be opened") as refused:
        tuning.tune(overrides, 1, storage)
    assert "\n" not in str(refused.value)


def test_folders_may_outlast_the_study(overrides, tmp_path):
    first = tuning.tune(overrides, trials=1)
    (tmp_path / "outputs" / "tuning" / "studies.db").unlink()
    again = tuning.tune(overrides, trials=2)
    assert again.trials[0].value == first.trials[0].value
    assert len(again.trials) == 2
    # The first trial is the same, and not repeated.
    assert len(list((tmp_path / "outputs").glob("tuning/**/metrics.json"))) == 2


def test_search_ends_if_all_trials_fail(overrides, monkeypatch):
    outcomes = iter([False, False, True, *[False] * 5])
    count = []

    def run(*_, **__):
        count.append(None)
        if next(outcomes):
            return {"val_accuracy": 0.5}
        raise RunError(f"the loss is infinite ({len(count)})")

    monkeypatch.setattr(tuning, "run", run)
    with pytest.raises(RunError, match=r"3 trials in a row .* the loss is infinite \(6\)"):
        tuning.tune(overrides, trials=3)
    assert len(count) == 6


def test_printed_command_can_be_pasted_into_a_shell(script, monkeypatch):
    import optuna

    study = optuna.create_study()
    study.add_trial(
        optuna.trial.create_trial(
            params={"optimizer.lr": 0.0123456789},
            distributions={"optimizer.lr": optuna.distributions.FloatDistribution(0, 1)},
            value=0.5,
        )
    )
    monkeypatch.setattr(tuning, "tune", lambda *_: study)
    overrides = ["student.model.channels=[4,8]", "data.root=/my images"]
    code, out, _ = script("tune.py", *overrides)
    assert code == 0
    assert shlex.split(out.splitlines()[-1]) == [*overrides, "optimizer.lr=0.0123457"]


def test_unpromising_trial_is_pruned(overrides):
    class Hopeless:
        def report(self, value, epoch):
            self.reported = epoch

        def should_prune(self):
            return True

    import optuna

    trial = Hopeless()
    callback = tuning.Pruning(trial)

    class Fitting:
        class state:  # noqa: N801
            fn = "fit"

        callback_metrics = {"val/accuracy": 0.1}  # noqa: RUF012
        current_epoch = 4

    with pytest.raises(optuna.TrialPruned):
        callback.on_validation_end(Fitting, None)
    assert trial.reported == 5


def test_every_method_has_a_search_space():
    space = tuning.default_space(api.compose("data=digits", "method=dkd"))
    assert space["method.terms.dkd.weight"] == tuning.Range(1 / 30, 30, log=True)
    assert space["method.terms.dkd.temperature"] == tuning.Range(1, 20, log=True)
    assert space["method.terms.cross_entropy.weight"] == tuning.Range(0, 1)
    space = tuning.default_space(api.compose("data=digits", "method=crd"))
    assert space["method.terms.crd.weight"].high == pytest.approx(24)
    assert "method.terms.crd.temperature" not in space  # 0.07 has another meaning
    alone = tuning.default_space(api.compose("data=digits", "method=matching"))
    assert set(alone) == {"optimizer.lr", "method.terms.logit.temperature"}


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        ([], "optimizer.lr", (0.02, 0.3)),
        (["optimizer=adamw"], "optimizer.lr", (0.002 / 15**0.5, 0.002 * 15**0.5)),
        (["method.terms.logit.weight=9"], "method.terms.logit.weight", (9 / 40**0.5, 9 * 40**0.5)),
        (["method.terms.cross_entropy.weight=3"], "method.terms.cross_entropy.weight", (0, 3)),
        (["method.terms.logit.temperature=40"], "method.terms.logit.temperature",
         (40 / 20**0.5, 40 * 20**0.5)),
        (["method=dkd", "method.terms.dkd.temperature=40"], "method.terms.dkd.temperature",
         (40 / 20**0.5, 40 * 20**0.5)),
    ],
)  # fmt: skip
def test_search_space_contains_the_configuration(overrides, key, expected):
    config = api.compose("data=digits", "method=logit", *overrides)
    space = tuning.default_space(config)
    assert space[key][:2] == pytest.approx(expected)
    for path, values in space.items():
        assert values.low <= tuning.select(config, path) <= values.high, path


def test_weight_of_a_term_that_is_off_is_not_searched():
    space = tuning.default_space(api.compose("data=digits", "method.terms.logit.weight=0"))
    assert not any(key.startswith("method.terms.logit.") for key in space)
    assert "method.terms.cross_entropy.weight" in space


def test_search_space_can_be_given():
    assert tuning.parse_range("optimizer.lr=0.01:0.3:log") == (
        "optimizer.lr", tuning.Range(0.01, 0.3, log=True),
    )  # fmt: skip
    assert tuning.parse_range("a.b=-1:8")[1] == tuning.Range(-1, 8)


@pytest.mark.parametrize(
    "text", ["lr", "lr=1", "lr=2:1", "lr=0:1:log", "lr=a:b", "=1:2", "lr=1:1e"]
)
def test_invalid_range_is_rejected(text):
    with pytest.raises(InputError, match="KEY=LOW:HIGH"):
        tuning.parse_range(text)
