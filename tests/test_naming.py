"""Equal configurations have the same folder, different ones different folders."""

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from kd_lightning.config import naming
from kd_lightning.config.complete import plain
from kd_lightning.config.tree import tree

naming.register()


def composed(*overrides):
    with initialize_config_dir(tree(), version_base="1.3"):
        return plain(compose("train", list(overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=5"],
        ["method=none", "student=large"],
        ["output_dir=elsewhere", "data_dir=elsewhere"],
        ["remember.disk_gb=0"],
    ],
)
def test_comparable_runs_share_a_setting(overrides):
    assert composed(*overrides)["setting"] == composed()["setting"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.max_epochs=3"],
        ["optimizer.lr=0.05"],
        ["teacher=resnet9"],
        ["teacher.trainer.max_epochs=3"],
        ["data.padding=2"],
        ["remember.dtype=float32"],
        ["+trainer.limit_train_batches=3"],
    ],
)
def test_setting_and_key_depend_on_everything_relevant(overrides):
    one, other = composed(), composed(*overrides)
    assert one["setting"] != other["setting"]
    assert naming.config_key(one) != naming.config_key(other)


def test_key_distinguishes_runs_of_one_setting():
    keys = {
        naming.config_key(composed(*overrides))
        for overrides in ([], ["seed=1"], ["method=none"], ["method.terms.logit.temperature=2"])
    }
    assert len(keys) == 4
    assert naming.config_key(composed("output_dir=x", "name=y")) == naming.config_key(composed())


@pytest.mark.parametrize(
    ("overrides", "suffix"),
    [
        ([], ""),
        (["method=logit", "student=small", "trainer.max_epochs=3"], ""),
        (["method.terms.logit.temperature=2"], "-logit.temperature_2"),
        (["+student.model.pool_after=2"], "-model.pool_after_2"),
        (["~student.model.hidden"], "-no-model.hidden"),
        (["student.model.channels=[4,8]"], "-model.channels_4_8"),
        (["student={model: {hidden: 8}}"], "-model_hidden_8"),
        (["+method={terms: {logit: {temperature: 2}}}"], "-terms_logit_temperature_2"),
        (["student.name=mine"], ""),
        (["method.terms.a.b='x/../y z'"], "-a.b_x_.._y_z"),
    ],
)
def test_variant_is_readable_and_safe(overrides, suffix):
    assert naming.variant(overrides) == suffix


def test_long_variant_is_shortened_and_unique():
    names = {naming.variant([f"method.terms.logit.{'x' * 100}={n}"]) for n in range(3)}
    assert len(names) == 3
    assert all(len(name) < 20 for name in names)


@pytest.mark.parametrize(
    "override",
    [
        "method.terms.attention.weight=1e3", "method.terms.logit.temperature=2.50",
        "student.pretrained=true", "+method.terms.mine.name=x", "method.terms.a='b c'",
        "method.terms.a=null", "student={name: a, b: True}", "student.model.channels=[4, 8]",
        f"student={{name: {'a' * 80}, b: true, c: 1e2}}", "~method.terms.logit",
    ],
)  # fmt: skip
def test_a_grid_and_a_single_run_have_the_same_name(override):
    overrides = OverridesParser.create().parse_overrides([override])
    (((as_in_a_grid,),),) = BasicSweeper.split_arguments(overrides, None)
    assert naming.variant([override]) == naming.variant([as_in_a_grid]) != ""


def test_names_of_method_and_student_are_one_part_of_a_path():
    assert composed("student.name=hf-hub:a/b")["name"].startswith("combined-hf-hub_a_b-s0")
