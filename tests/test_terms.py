"""The interface of loss terms, checked for ours and for user-defined ones."""

import json
import re
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from torch import nn

from kd_lightning import losses
from kd_lightning.data.loading import Shown
from kd_lightning.data.views import Normalization
from kd_lightning.distill.ensemble import Ensemble
from kd_lightning.distill.module import DistillationModule
from kd_lightning.distill.teacher import FrozenTeacher
from kd_lightning.errors import InputError
from kd_lightning.losses import (
    CRD,
    DIST,
    DKD,
    MLKD,
    NKD,
    NST,
    OFD,
    PKT,
    RKD,
    SP,
    VID,
    Attention,
    Context,
    CrossEntropy,
    FitNet,
    HardLabel,
    Logit,
    OwnTeacher,
    Reads,
    ReviewKD,
    Term,
    TermBatch,
    TfKD,
)
from kd_lightning.models import ConvNet, layer_shapes
from kd_lightning.models.features import FeatureReader

LAYERS = ("stage1", "stage2")


class Projected(Term):
    """Penultimate features with a trained projector: term parameters, layer inputs."""

    def setup(self, context):
        student, teacher = (
            s.inputs["classifier.2:input"] for s in (context.student, context.teacher)
        )
        self.projector = nn.Linear(*student, *teacher)
        return Reads(("classifier.2:input",), ("classifier.2:input",), teacher_logits=False)

    def remember(self, teacher):
        return teacher.features["classifier.2:input"].float()

    def depends_on(self):
        return {}

    def forward(self, student, remembered, batch):
        features = self.projector(student.features["classifier.2:input"].float())
        return F.mse_loss(features, remembered)


class Several(Term):
    """Two targets, by name."""

    def setup(self, context):
        return Reads(student=("stage2",), teacher=("stage2",))

    def remember(self, teacher):
        return {
            "logits": teacher.logits.float(),
            "means": teacher.features["stage2"].float().mean((2, 3)),
        }

    def depends_on(self):
        return {"layer": "stage2"}

    def forward(self, student, remembered, batch):
        loss = (student.logits.float() - remembered["logits"]).square().mean()
        # Features are included later in the training.
        return loss + batch.progress * remembered["means"].square().mean()


class Relations(Term):
    """Similarity of images (Tung & Mori 2019), which depends on the whole batch."""

    relational: ClassVar[bool] = True

    def remember(self, teacher):
        return teacher.logits.float()

    def depends_on(self):
        return {}

    def forward(self, student, remembered, batch):
        alike = [F.normalize(x @ x.T, dim=1) for x in (student.logits.float(), remembered)]
        return F.mse_loss(*alike)


TERMS = {
    "cross-entropy": CrossEntropy,
    "smoothed cross-entropy": lambda: CrossEntropy(label_smoothing=0.1),
    "logit": Logit,
    "logit, standardized": lambda: Logit(2, standardize=True),
    "hard label": HardLabel,
    "dkd": lambda: DKD(warmup=0),
    "dkd, standardized": lambda: DKD(9, 72, 2, warmup=0, standardize=True),
    "dist": DIST,
    "nkd": lambda: NKD(3.5, 3),
    "mlkd": MLKD,
    "tfkd": TfKD,
    "attention": lambda: Attention(LAYERS, LAYERS),
    "attention, norm": lambda: Attention(LAYERS, LAYERS, distance="norm"),
    "attention, inputs": lambda: Attention(pairs=[["stage2:input", "stage2:input"]]),
    "own teacher": OwnTeacher,
    "fitnet": FitNet,
    "fitnet, all": lambda: FitNet(pairs=[["stage1", "stage1"], ["stage2", "stage2"]]),
    "vid": VID,
    "nst": NST,
    "ofd": OFD,
    "ofd, inputs": lambda: OFD(pairs=[["stage1.2:input", "stage1.2:input"]]),
    "reviewkd": lambda: ReviewKD(warmup=0),
    "reviewkd, maps": lambda: ReviewKD(embedding=False, warmup=0),
    "sp": SP,
    "sp, vectors": lambda: SP("embedding", "embedding"),
    "rkd": RKD,
    "rkd, maps": lambda: RKD("last_stage", "stage1"),
    "pkt": PKT,
    "crd": lambda: CRD(size=8),
    # In evaluation mode the memory bank is not updated, so that every call gives the same loss.
    "crd, memory": lambda: CRD(size=8, memory=True, negatives=20).eval(),
    "projected": Projected,
    "several": Several,
    "relations": Relations,
}


def test_every_term_is_checked():
    """Except SimKD, which changes the student; see tests/test_simkd.py."""
    exported = {getattr(losses, name) for name in losses.__all__}
    terms = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, Term)}
    base = {Term, losses.LogitTerm, losses.MapTerm}
    checked = {type(build()) for build in TERMS.values()} - {Projected, Several, Relations}
    assert terms - base - {losses.SimKD} == checked


@pytest.fixture
def networks():
    torch.manual_seed(0)
    student = ConvNet([4, 8], 8, num_classes=3, image_size=16)
    return student, ConvNet([6, 10], 12, num_classes=3, image_size=16).eval().requires_grad_(False)


@pytest.fixture(params=TERMS)
def term(request, networks):
    """A term after setup, with feature readers of both networks."""
    term = TERMS[request.param]()
    student, teacher = networks
    context = Context(layer_shapes(student, 16), layer_shapes(teacher, 16), 3, 100)
    reads = term.setup(context)
    return term, FeatureReader(student, reads.student), FeatureReader(teacher, reads.teacher)


def remembered(term, read, images):
    """A term's targets as a dictionary."""
    if not term.needs_teacher:
        return {}
    value = term.remember(read(images, complete=True))
    return {"": value} if isinstance(value, torch.Tensor) else value


def value(term, read_student, read_teacher, images, labels, **given):
    kept = remembered(term, read_teacher, images)
    targets = kept.get("", kept or None)
    index = torch.arange(len(labels))
    return term(read_student(images), targets, TermBatch(labels, index, index, **given))


IMAGES, LABELS = (
    torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
    torch.arange(6) % 3,
)


def test_targets_are_one_independent_row_per_image(term):
    term, _, read = term
    whole, part = (remembered(term, read, images) for images in (IMAGES, IMAGES[2:4]))
    for name, rows in whole.items():
        assert rows.dtype == torch.float32
        assert len(rows) == len(IMAGES)
        torch.testing.assert_close(rows[2:4], part[name])
    assert bool(whole) == term.needs_teacher
    assert json.loads(json.dumps(term.depends_on())) == term.depends_on()


def test_loss_is_a_finite_scalar_with_gradients(term, networks):
    term, *read = term
    loss = value(term, *read, IMAGES, LABELS)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in networks[0].parameters())
    assert all(p.grad is not None and p.grad.any() for p in term.parameters())


def test_loss_is_the_batch_mean_unless_relational(term):
    term, *read = term
    term.eval()  # BatchNorm of a projector depends on the batch, like that of a student
    whole = value(term, *read, IMAGES, LABELS)
    halves = [value(term, *read, IMAGES[part], LABELS[part]) for part in (slice(3), slice(3, 6))]
    mean = torch.stack(halves).mean()
    assert term.relational != torch.allclose(whole, mean, rtol=1e-4)


def test_loss_of_one_image_is_finite(term, networks):
    term, *read = term
    loss = value(term, *read, IMAGES[:1], LABELS[:1], progress=1.0)
    loss.backward()
    assert loss.isfinite()
    trained = [*networks[0].parameters(), *term.parameters()]
    assert all(p.grad is None or p.grad.isfinite().all() for p in trained)


def test_loss_of_mixed_images(term):
    """Equal to that of plain images if the share is 1, also of the partners; linear in between."""
    term, *read = term
    partners = LABELS.flip(0)

    def mixed(share):
        ratio = torch.full((len(LABELS),), share)
        return value(term, *read, IMAGES, LABELS, partner_labels=partners, ratio=ratio)

    plain = [value(term, *read, IMAGES, labels) for labels in (LABELS, partners)]
    torch.testing.assert_close(mixed(1.0), plain[0])
    torch.testing.assert_close(mixed(0.0), plain[1])
    if not isinstance(term, CRD):  # it has no targets, and uses the class of the larger share
        torch.testing.assert_close(mixed(0.25), 0.25 * plain[0] + 0.75 * plain[1])


def test_loss_works_with_autocast(term):
    term, *read = term
    plain = value(term, *read, IMAGES, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        loss = value(term, *read, IMAGES, LABELS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=0.2, atol=0.02)


def test_terms_receive_the_progress():
    torch.manual_seed(0)
    student, teacher = ConvNet([4, 8], 8, 3, 16), ConvNet([4, 8], 8, 3, 16)
    context = Context(layer_shapes(student, 16), layer_shapes(teacher, 16), 3)
    term = Several()
    reads = term.setup(context)
    read = FeatureReader(student, reads.student), FeatureReader(teacher, reads.teacher)
    early, late = (value(term, *read, IMAGES, LABELS, progress=p) for p in (0.0, 1.0))
    assert late > early


def test_module_passes_requested_features_to_terms():
    """Dictionaries, layer inputs, labels and progress, through the module."""
    torch.manual_seed(0)
    half = Normalization((0.5,) * 3, (0.5,) * 3)
    teacher = FrozenTeacher(ConvNet([6, 10], 12, 3, 16), expects=half, given=half)
    node = {"_target_": "kd_lightning.models.ConvNet", "channels": [4, 8], "hidden": 8,
            "num_classes": 3, "image_size": 16}  # fmt: skip
    names = ("Projected", "Several", "Relations")
    terms = {n.lower(): {"_target_": f"{__name__}.{n}", "weight": 1.0} for n in names}
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.1}
    module = DistillationModule(node, terms, sgd, None, 3, 16, train_size=7, teacher=teacher)
    batch = {"images": IMAGES, "labels": LABELS, "shown": Shown(torch.arange(6), torch.arange(6))}
    losses, _ = module.losses(batch, progress=0.5)
    assert list(losses) == ["projected", "several", "relations"]
    assert module.ask_teacher(IMAGES).keys() == {
        "projected", "several/logits", "several/means", "relations"
    }  # fmt: skip
    # Parameters of a term are trained with the student, but are not part of it.
    trained = {name for name, _ in module.named_parameters()}
    assert "terms.projected.projector.weight" in trained
    assert not any("projector" in name for name in module.student.state_dict())


class Named(Term):
    """Reads layers that an argument names."""

    def __init__(self, student="embedding", teacher="embedding"):
        super().__init__()
        self.names = student, teacher

    def setup(self, context):
        return Reads(*((name,) for name in self.names), teacher_logits=False)

    def remember(self, teacher):
        return teacher.features[self.names[1]].mean(1, keepdim=True)

    def forward(self, student, remembered, batch):
        return (student.features[self.names[0]].mean(1, keepdim=True) - remembered).square().mean()


def module_of(target, teachers=1, **settings):
    half = Normalization((0.5,) * 3, (0.5,) * 3)
    torch.manual_seed(0)
    networks = [ConvNet([6, 10 + n], 12 + n, 3, 16) for n in range(teachers)]
    members = [FrozenTeacher(network, expects=half, given=half) for network in networks]
    node = {"_target_": "kd_lightning.models.ConvNet", "channels": [4, 8], "hidden": 8,
            "num_classes": 3, "image_size": 16}  # fmt: skip
    terms = {"mine": {"_target_": target, "weight": 1.0, **settings}}
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.1}
    teacher = Ensemble(members) if teachers > 1 else members[0]
    return DistillationModule(node, terms, sgd, None, 3, 16, train_size=7, teacher=teacher)


BATCH = {"images": IMAGES, "labels": LABELS, "shown": Shown(torch.arange(6), torch.arange(6))}


@pytest.mark.parametrize("teachers", [1, 2])
def test_terms_may_read_roles(teachers):
    by_role = module_of(f"{__name__}.Named", teachers)
    layers = dict.fromkeys(("student", "teacher"), by_role.student.roles.embedding)
    by_name = module_of(f"{__name__}.Named", teachers, **layers)
    losses = [module.losses(BATCH)[0]["mine"] for module in (by_role, by_name)]
    assert losses[0] > 0
    assert torch.equal(*losses)


def test_layer_has_precedence_over_a_role_of_that_name():
    model = ConvNet([4], 8, 3, 16)
    model.embedding = nn.Identity()
    context = Context(layer_shapes(model, 16), {}, 3)
    assert Reads(("embedding",)).of_student(context) == {"embedding": "embedding"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"student": "fc"}, "in the student there is no layer 'fc'; layers: stage1.0"),
        ({"teacher": "fc:input"}, "in the teacher there is no layer 'fc:input'; layers: "),
        ({"student": "stages"}, "'stages' of the student is stage1, stage2: name one layer"),
    ],
)
def test_unknown_layer_of_a_term_is_reported(settings, words):
    with pytest.raises(InputError) as error:
        module_of(f"{__name__}.Named", **settings)
    assert str(error.value).startswith(f"method.terms.mine: {words}")


def test_documented_term(tmp_path, monkeypatch):
    text = (REPOSITORY / "docs" / "methods.md").read_text()
    (tmp_path / "mypackage.py").write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    monkeypatch.syspath_prepend(tmp_path)
    losses, _ = module_of("mypackage.Cosines").losses(BATCH)
    losses["mine"].backward()
    assert 0 < losses["mine"] < 1
