"""SimKD: the student with the teacher's classifier."""

import pytest
import torch
from reference_cases import cases, check_digest
from safetensors.torch import load_file
from torch import nn

from kd_lightning import api
from kd_lightning.errors import InputError
from kd_lightning.losses import Context, SimKD, TermBatch
from kd_lightning.losses.fitnet import hint_loss
from kd_lightning.models import CifarResNet, ConvNet, FeatureReader, ResNet9, layer_shapes
from kd_lightning.models.features import Output
from kd_lightning.models.pooling import pool
from kd_lightning.models.preparing import materialize
from kd_lightning.models.reused_classifier import ReusedClassifier

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def student(channels=16, size=4, pooling="max", encoder=None):
    torch.manual_seed(0)
    model = ReusedClassifier(encoder or ConvNet([4, 6], 8), channels, size, 10, pooling)
    materialize(model, 32, "student.model")
    return model


def set_up(student, teacher):
    term = SimKD()
    context = Context(layer_shapes(student, 32), layer_shapes(teacher, 32), 10)
    reads = term.setup(context)
    return term, FeatureReader(student, reads.student), FeatureReader(teacher, reads.teacher)


@pytest.mark.parametrize(
    ("teacher", "arguments"),
    [
        (lambda: ResNet9(2, logit_scale=0.25), (16, 4, "max")),
        (lambda: CifarResNet(8), (64, 8, "average")),
    ],
    ids=["resnet9", "resnet8"],
)
def test_student_with_the_teachers_features_predicts_as_the_teacher(teacher, arguments):
    torch.manual_seed(1)
    teacher, model = teacher().eval(), student(*arguments).eval()
    term, read_student, read_teacher = set_up(model, teacher)
    nn.init.normal_(teacher.linear.weight)  # loaded after `setup`, as in a run
    term.begin()
    wanted = term.remember(read_teacher(IMAGES, complete=True))
    labels = torch.arange(4)
    loss = term(read_student(IMAGES), wanted, TermBatch(labels, labels, labels))
    assert loss > 0
    with torch.no_grad():
        features = teacher.forward_features(IMAGES)
        model.projector = nn.Identity()
        model.encoder.forward_features = lambda _: features
        torch.testing.assert_close(model(IMAGES), teacher(IMAGES))


def test_only_the_difference_of_the_maps_is_learned():
    teacher, model = ResNet9(2).eval(), student()
    term, *_ = set_up(model, teacher)
    labels = torch.arange(2)
    given = torch.ones(2, 16, 4, 4, requires_grad=True)
    output = Output(torch.zeros(2, 10), {"projector": given})
    loss = term(output, {"0": torch.full((2, 16, 4, 4), 3.0)}, TermBatch(labels, labels, labels))
    assert float(loss) == 4
    assert not model.classifier.weight.requires_grad
    assert list(term.parameters()) == []


def test_parameters_are_those_that_predict():
    model = student()
    trained = {name for name, part in model.named_parameters() if part.requires_grad}
    model(IMAGES).sum().backward()
    assert {name for name, part in model.named_parameters() if part.grad is not None} == trained
    assert not any("encoder.classifier" in name for name in model.state_dict())


def with_sizes(model):
    """With a last map of 16 channels and 4x4."""
    model.layer3.append(nn.Sequential(nn.Conv2d(64, 16, 1), nn.AvgPool2d(2), nn.ReLU()))
    model.linear = nn.Linear(16, 10)
    return model


class Twice(ResNet9):
    """Logits that are not the output of the classifier."""

    def forward(self, images):
        return 2 * super().forward(images)


@pytest.mark.parametrize("case", cases("maps", "SimKD"))
def test_loss_and_logits_of_the_authors(case):
    def loss(student, teacher, w1, w2, w3, cw, cb):
        size = min(student.shape[2], teacher.shape[2])
        encoder = nn.Identity()
        encoder.forward_features = lambda maps: maps
        model = ReusedClassifier(encoder, teacher.shape[1], size, len(cw), "average").double()
        weights = {"projector.0.weight": w1, "projector.3.weight": w2, "projector.6.weight": w3,
                   "classifier.weight": cw, "classifier.bias": cb}  # fmt: skip
        model.eval()(student.detach())  # creates the first convolution
        model.train("/train" in case.id)
        maps = {}
        handle = model.projector.register_forward_hook(
            lambda _module, _inputs, output: maps.update(projected=output)
        )
        logits = torch.func.functional_call(model, weights, (student,))
        handle.remove()
        check_digest(logits, case.content["outputs"]["logits"])
        return hint_loss(maps["projected"], pool(teacher, (size, size)))

    case.check(loss)


@pytest.mark.parametrize(
    ("model", "teacher", "words"),
    [
        (lambda: ConvNet([4, 6], 8), lambda: ResNet9(2), "select method=simkd"),
        (lambda: student(8), lambda: ResNet9(2), "channels=16"),
        (lambda: student(16, 8), lambda: ResNet9(2), "size=4"),
        (lambda: student(), lambda: with_sizes(CifarResNet(8)), "pooling=average"),
        (lambda: student(64, 8), lambda: CifarResNet(8), r"channels=64 .*size=8 .*pooling=average"),
        (lambda: student(), lambda: Twice(2), "cannot be reused"),
        (lambda: student(), lambda: ConvNet([4, 16], 8), "cannot be reused"),
    ],
)
def test_student_that_does_not_fit_is_reported(model, teacher, words):
    with pytest.raises(ValueError, match=words):
        set_up(model(), teacher())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pooling": "min"}, "pooling must be one of average, max"),
        ({"encoder": nn.Linear(2, 2)}, "has no method forward_features"),
    ],
)
def test_invalid_students_are_rejected(arguments, words):
    with pytest.raises(ValueError, match=words):
        ReusedClassifier(**{"encoder": ConvNet([4], 8), "channels": 4, "size": 4, **arguments})


def test_run_of_a_reused_classifier(train, tmp_path):
    common = (
        "student.model.channels=[4,8]", "student.model.hidden=8", "teacher=resnet9",
        "teacher.model.width=2", "trainer.accelerator=cpu", "trainer.max_epochs=1",
        "teacher.trainer.max_epochs=1",
    )  # fmt: skip
    settings = ("method.student_wrapper.channels=16", "method.student_wrapper.size=2")
    # A moving average of the weights must not begin with another classifier.
    done = train(*common, "method=simkd", *settings, "setting=here", "ema=0.9", tiny=False)
    assert done.code == 0, done.err
    # The file is complete: no teacher is needed to predict.
    loaded = api.load_student(done.runs[0])
    assert isinstance(loaded.model, ReusedClassifier)
    (weights,) = tmp_path.glob("outputs/teachers/*/teacher.safetensors")
    teacher = load_file(weights)["linear.weight"] * 0.125
    torch.testing.assert_close(loaded.model.classifier.weight.detach(), teacher)
    metrics = done.metrics
    assert metrics["parameters"] == sum(part.numel() for part in loaded.model.parameters())
    # The baseline is the same student, without the wrapper.
    none = train(*common, "method=none", "setting=here", "ema=0.9", tiny=False)
    assert none.metrics["baseline_key"] == metrics["baseline_key"]
    wrong = train(*common, "method=simkd", tiny=False)
    assert wrong.code == 2
    assert "set method.student_wrapper.channels=16" in wrong.err


def test_wrapper_is_rejected_without_a_target():
    from kd_lightning.config.checks import check

    with pytest.raises(InputError, match=r"method\.student_wrapper"):
        check(api.compose("data=digits", "method=simkd", "method.student_wrapper=3"))


def test_ensemble_is_rejected():
    from kd_lightning.config.checks import check

    members = ("teacher=resnet9", "teacher.members=[{seed: 0},{seed: 1}]")
    with pytest.raises(InputError, match=r"method=simkd reuses .* teacher\.members names several"):
        check(api.compose("data=digits", "method=simkd", *members))
    check(api.compose("data=digits", "method=simkd", *members[:1], "teacher.members=[{seed: 0}]"))
