"""The command line: accepted syntax, and suggestions for mistakes."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from test_tensorboard import scalars

from kd_lightning.config import naming, overrides
from kd_lightning.config.checks import check, check_sections
from kd_lightning.config.commandline import check_overrides, expand_home, prepare
from kd_lightning.config.complete import plain
from kd_lightning.config.nodes import select
from kd_lightning.config.tree import tree_folder
from kd_lightning.errors import InputError
from kd_lightning.files import home

naming.register()
overrides.install()


def composed(*given):
    with initialize_config_dir(tree_folder(), version_base="1.3"):
        config = plain(compose("train", check_overrides(given)))
    check_sections(config)
    return config


def refusal(*given):
    with pytest.raises(InputError) as refused:
        composed(*prepare(given))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture(scope="module")
def whole():
    """The configuration to which overrides of values are applied."""
    with initialize_config_dir(tree_folder(), version_base="1.3"):
        return compose("train")


def value_of(override):
    return OverridesParser.create().parse_overrides([override])[0].value()


# --- did you mean --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("trainer.max_epoch=1", "trainer.max_epochs?"),
        ("~trainer.max_epoch", "trainer.max_epochs?"),
        ("teacher.trainer.max_epoch=1", "teacher.trainer.max_epochs?"),
        ("methd=logit", "method?"),
        ("optimiser.lr=1", "optimizer.lr?"),
        ("optimizer.momentun=1", "optimizer.momentum?"),
        ("scheduler.warmup=0.1", "scheduler.warmup_fraction?"),
        ("method.terms.logits.weight=1", "method.terms.logit.weight?"),
        ("method.terms.logit.temprature=1", "method.terms.logit.temperature?"),
        ("student.model.hiden=1", "student.model.hidden?"),
        ("data.batchsize=1", "data.batch_size?"),
        ("teacher.ignore_key=[a]", "teacher.ignore_keys?"),
        ("lr=0.1", "optimizer.lr?"),
        ("epochs=3", "trainer.max_epochs?"),
        ("trainer.epochs=3", "trainer.max_epochs?"),
        ("temperature=3", "method.terms.logit.temperature?"),
        ("trainer.limit_train_batch=1", "+trainer.limit_train_batches?"),
        ("hydra/launchr=joblib", "hydra/launcher?"),
    ],
)
def test_typo_in_a_key_gets_a_suggestion(whole, given, meant):
    if "/" in given or "~" in given:
        sentence = refusal(given)
    else:  # without composing the same configuration again
        with pytest.raises(InputError) as refused:
            overrides.apply(OverridesParser.create().parse_overrides([given]), whole)
        sentence = str(refused.value)
    assert f"did you mean {meant}" in sentence
    assert "add it with" not in sentence


@pytest.mark.parametrize("given", ["method=logits", "teacher=resnet90", "experiment=demoo"])
def test_typo_in_a_choice_gets_a_suggestion(given, train):
    choice = given.partition("=")[2]
    done = train(given, tiny=False, data=False)
    assert done.code == 2
    assert f"{given} does not exist; did you mean {choice[:-1]}? choose from" in done.err


def test_plus_is_suggested_only_for_valid_arguments():
    assert "add it with +trainer.limit_val_batches=VALUE" in refusal("trainer.limit_val_batches=3")
    assert "+" not in refusal("student.model.zzz=3")
    assert "omit the +" in refusal("+trainer.max_epochs=3")
    assert composed("+trainer.limit_val_batches=3")["trainer"]["limit_val_batches"] == 3


def test_suggestion_prefers_a_different_last_character():
    sentence = overrides.no_such_choice("teacher", "resnet21", ["resnet32", "resnet20", "resnet9"])
    assert "did you mean resnet20?" in sentence


@pytest.mark.parametrize("given", ["method=5", "trainer=1.5", "data=true"])
def test_group_choice_must_be_a_name(given):
    assert "choose from" in refusal(given)


# --- dictionaries and null -----------------------------------------------------------------------


def test_dictionary_override_may_add_keys():
    one = composed("teacher.rename_keys={model.: '', fc.: linear.}")
    assert one["teacher"]["rename_keys"] == {"model.": "", "fc.": "linear."}
    one = composed("trainer={max_epochs: 3, limit_train_batches: 2}")["trainer"]
    assert (one["max_epochs"], one["limit_train_batches"], one["precision"]) == (3, 2, "auto")
    one = composed("method.terms={mine: {_target_: kd_lightning.losses.CrossEntropy, weight: 1}}")
    assert set(one["method"]["terms"]) == {"cross_entropy", "logit", "attention", "mine"}


def test_node_with_another_target_is_replaced():
    node = {"_target_": "torch.optim.Adam", "lr": 0.001, "betas": [0.9, 0.99]}
    text = "{_target_: torch.optim.Adam, lr: 0.001, betas: [0.9, 0.99]}"
    assert composed(f"optimizer={text}")["optimizer"] == node
    assert composed("experiment=demo", f"optimizer={text}")["optimizer"] == node
    assert composed(f"teacher.optimizer={text}")["teacher"]["optimizer"] == node
    model = "{name: own, model: {_target_: torchvision.models.resnet18, num_classes: 3}}"
    student = composed(f"student={model}")["student"]
    assert student["model"] == {"_target_": "torchvision.models.resnet18", "num_classes": 3}
    assert student["layers"] == ["stage1", "stage2"]
    # With the same target, or none, it is merged.
    assert composed("optimizer={lr: 0.3}")["optimizer"]["momentum"] == 0.9
    same = composed("optimizer={_target_: torch.optim.SGD, lr: 0.3}")["optimizer"]
    assert (same["lr"], same["momentum"]) == (0.3, 0.9)


@pytest.mark.parametrize("given", ["scheduler=null", "scheduler=none", "~scheduler"])
def test_scheduler_can_be_removed(given):
    assert composed(given)["scheduler"] is None
    assert composed(given)["teacher"]["scheduler"] is not None


@pytest.mark.parametrize(
    "given",
    ["teacher.scheduler=null", "teacher.scheduler=none", "~teacher.scheduler",
     "scheduler@teacher.scheduler=null"],
)  # fmt: skip
def test_scheduler_of_the_teacher_can_be_removed(given):
    assert composed(given)["teacher"]["scheduler"] is None
    assert composed(given)["scheduler"] is not None


def test_run_without_scheduler_has_constant_learning_rate(train):
    done = train("method=none", "scheduler=null", "trainer.log_every_n_steps=1")
    assert done.code == 0, done.err
    rates = [rate for _, rate in scalars(done.runs[0])["lr-SGD"]]
    assert rates == [pytest.approx(0.01)] * 6  # of TINY, in two epochs of three steps


def test_choice_name_instead_of_a_node_gets_a_suggestion():
    assert "optimizer@teacher.optimizer=adamw" in refusal("teacher.optimizer=adamw")
    target = composed("optimizer@teacher.optimizer=adamw")["teacher"]["optimizer"]["_target_"]
    assert target == "torch.optim.AdamW"


def test_optional_keys_do_not_rename_runs():
    assert "ignore_keys" not in composed()["teacher"]
    with_it = composed("teacher.ignore_keys=[aux.*]")
    assert with_it["teacher"]["ignore_keys"] == ["aux.*"]
    assert with_it["setting"] != composed()["setting"]
    assert "list of patterns" in refusal_of_check("teacher.ignore_keys=aux")
    assert "rename_keys" in refusal_of_check("teacher.rename_keys={a: 1}")


def refusal_of_check(*given):
    with pytest.raises(InputError) as refused:
        check(composed(*given))
    return str(refused.value)


@pytest.mark.parametrize("key", ["seed", "teacher.seed", "data.view_seed", "data.split_seed"])
@pytest.mark.parametrize("value", ["abc", "-1", "1.5", "4294967296", "1" + 40 * "0", "true"])
def test_seeds_out_of_range_are_rejected(key, value):
    assert f"{key} must be a whole number from 0" in refusal_of_check(f"{key}={value}")


# --- quoting -------------------------------------------------------------------------------------

AWKWARD = [
    "/tmp/a=b", "/tmp/a(1)", "/tmp/é", "/tmp/日本", "/tmp/a#b", "/tmp/a~b", "/tmp/[x]", "/tmp/{x}",
    "/tmp/a;b", "/tmp/a&b", "/tmp/it's (1)", '/tmp/a"b=', "C:\\data\\é", "/tmp/a=\\", "/tmp/a,b=",
    "/tmp/x,", "a b=c",
]  # fmt: skip


@pytest.mark.parametrize("value", AWKWARD)
def test_suggested_quoting_works(value):
    sentence = refusal(f"data.root={value}")
    assert f"data.root={value} cannot be read" in sentence
    suggestion = sentence.split(": write ")[1].removesuffix(
        " (quoted for the shell, and within that for Hydra)"
    )
    (word,) = shlex.split(suggestion)
    assert value_of(word) == value
    echo = subprocess.run(["bash", "-c", f"printf %s {suggestion}"], capture_output=True, text=True)
    assert echo.stdout == word


@pytest.mark.parametrize(
    ("given", "suggestion"),
    [
        (["method", "=", "logit"], "method=logit"),
        (["method=", "logit"], "method=logit"),
        (["method", "=logit"], "method=logit"),
        (["method = logit"], "method=logit"),
        (["trainer.max_epochs", "5"], "trainer.max_epochs=5"),
        (["method:logit"], "method=logit"),
        (["seed==5"], "seed=5"),
        (["logit"], "method=logit"),
        (["demo"], "experiment=demo"),
        (["help"], "--help"),
        (["--epochs", "5"], "trainer.max_epochs=5"),
        (["--batch-size=64"], "data.batch_size=64"),
        (["--method=logit"], "method=logit"),
        (["seed=1", "-lr", "0.1"], "optimizer.lr=0.1"),
        (["data.root=/my", "images"], "data.root='/my images'"),
        (["data.root=/my", "images", "(1)"], "data.root='/my images'"),
        (["optimizer={_target_:", "a.B,", "lr:", "1}"], "optimizer='{_target_: a.B, lr: 1}'"),
        (['optimizer={"lr": 0.1}'], "optimizer='{lr: 0.1}'"),
        (["teacher.layers=[a=b]"], """teacher.layers='["a=b"]'"""),
        (['data.root="/tmp'], "data.root=/tmp"),
        (["optimizer={lr: 1"], "no closing }"),
        (["\u2013m", "seed=1"], "dash"),
        (["student.layers[0]=x"], "whole list"),
        (["=5"], "not KEY=VALUE"),
        (["--cfg"], "--cfg"),
    ],
)
def test_malformed_override_gets_a_suggestion(given, suggestion):
    assert suggestion in refusal(*given)


def test_several_values_without_multirun_get_a_suggestion(train):
    done = train("method=none,logit", tiny=False)
    assert done.code == 2
    assert "-m" in done.err
    assert """method='"none,logit"'""" in done.err


# --- options and home ----------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["-m", "--multirun"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_options_are_accepted_in_any_position(option, place):
    words = ["method=none,logit", "seed=0,1"]
    words.insert(place, option)
    assert prepare(words) == ["method=none,logit", "seed=0,1", option]
    assert prepare(["a=1", "--cfg", "job", "b=2", "--config-dir", "x"]) == [
        "a=1", "b=2", "--cfg", "job", "--config-dir", "x",
    ]  # fmt: skip


def test_multirun_option_between_overrides(train, monkeypatch):
    trained = []
    monkeypatch.setattr(
        "kd_lightning.workflows.student.run",
        lambda config, *_, **__: trained.append((config["method"]["name"], config["seed"])) or {},
    )
    done = train("method=none", "-m", "seed=0,1")
    assert done.code == 0, done.err
    assert trained == [("none", 0), ("none", 1)]


def test_home_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("output_dir", "data_dir", "teacher.checkpoint", "data.root", "+data.cache_dir")
    for override in ("{}=~/x", '{}="~/x"', "{}='~/x'"):
        one = composed(*(override.format(key) for key in keys))
        for key in keys:
            assert select(one, key.lstrip("+")) == f"{tmp_path}/x"
    assert expand_home("hydra.run.dir=~/x") == f"hydra.run.dir={tmp_path}/x"
    assert expand_home("--config-dir=~/x") == f"--config-dir={tmp_path}/x"
    assert expand_home("data.root=~/a,~/b") == f"data.root={tmp_path}/a,{tmp_path}/b"
    assert expand_home("~scheduler") == "~scheduler"
    monkeypatch.setenv("KD_DATA_DIR", "~/kept")
    assert composed()["data_dir"] == f"{tmp_path}/kept"
    assert home("~/x") == f"{tmp_path}/x"  # used by the scripts
    assert home("a/~/x") == "a/~/x"


def test_home_with_special_characters(monkeypatch):
    monkeypatch.setenv("HOME", "/home/josé (1)")
    assert composed("output_dir=~/x")["output_dir"] == "/home/josé (1)/x"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("teacher.trainer=null", "teacher.trainer must be a dictionary"),
        ("~trainer.precision", "trainer.precision must be given"),
    ],
)
def test_incomplete_section_is_reported(given, words):
    assert words in refusal(given)


def test_home_of_an_unknown_user_is_reported():
    with pytest.raises(InputError, match=r"data\.root=~nobody-here/x"):
        expand_home("data.root=~nobody-here/x")


@pytest.mark.parametrize(
    ("text", "line"), [("name: x\n\tlayers: []\n", 2), ("name: x\nname: y\n", 2)]
)
def test_configuration_with_a_syntax_error_is_named(tmp_path, train, text, line):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mine.yaml").write_text(text)
    done = train(f"--config-dir={tmp_path}", "student=mine")
    assert done.code == 2
    assert f"mine.yaml, line {line}: " in done.err
    assert "Traceback" not in done.err


def test_run_in_the_home_folder(monkeypatch, tmp_path, train):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = train("method=none", "output_dir=~/outputs", "trainer.max_epochs=1")
    assert done.code == 0, done.err
    assert len(done.runs) == 1
    assert not Path("~").exists()


def test_the_version_is_printed(train, capsys, monkeypatch):
    from kd_lightning import __version__, cli

    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1", "--version"])
    cli.main()
    assert re.fullmatch(rf"kd_lightning {__version__}\n", capsys.readouterr().out)
