"""Terms that compare feature maps, with unlike architectures and through the command line."""

import pytest
import torch
from test_map_losses import batch, images
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kd_lightning.data.views import Normalization
from kd_lightning.distill.module import DistillationModule
from kd_lightning.distill.teacher import FrozenTeacher
from kd_lightning.losses import NST, OFD, VID, Attention, Context, FitNet, ReviewKD
from kd_lightning.models import CifarResNet, ConvNet, layer_shapes
from kd_lightning.models.features import FeatureReader

CLASSES = {"fitnet": FitNet, "vid": VID, "nst": NST, "ofd": OFD, "reviewkd": ReviewKD}
TERMS = {**CLASSES, "reviewkd": lambda: ReviewKD(warmup=0)}


class Tokens(nn.Module):
    """A small vision transformer: patches of 4x4, a class token, two blocks."""

    def __init__(self, size):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.first = nn.Parameter(torch.zeros(1, 1, 12))
        self.position = nn.Parameter(torch.randn(1, (size // 4) ** 2 + 1, 12))
        block = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(12, 2, 16, **block) for _ in range(2)
        )
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


NETWORKS = {
    "convnet": lambda: ConvNet([4, 8], 8, 3, 16),
    "resnet": lambda: CifarResNet(8, 3),
    "tokens": lambda: Tokens(16),
}
UNLIKE = [(s, t) for s in NETWORKS for t in NETWORKS if s != t]


@pytest.mark.parametrize(("student", "teacher"), UNLIKE)
@pytest.mark.parametrize("name", TERMS)
def test_unlike_architectures(name, student, teacher):
    """Gradients reach the student and the term's own parameters."""
    torch.manual_seed(0)
    learner, term = NETWORKS[student](), TERMS[name]()
    master = NETWORKS[teacher]().eval().requires_grad_(False)
    reads = term.setup(Context(layer_shapes(learner, 16), layer_shapes(master, 16), 3))
    kept = term.remember(FeatureReader(master, reads.teacher)(images(16)))
    assert not {*master.parameters()} & {*term.parameters()}
    loss = term(FeatureReader(learner, reads.student)(images(16)), kept, batch())
    assert loss.isfinite()
    gradients = torch.autograd.grad(
        loss, [*learner.parameters(), *term.parameters()], allow_unused=True
    )
    count = len([*learner.parameters()])
    assert any(g is not None and g.any() for g in gradients[:count])
    assert all(g is not None and g.any() and g.isfinite().all() for g in gradients[count:])


class Recorded(TorchDispatchMode):
    """Names of all operations, of the backward pass too."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*TERMS, "attention"])
def test_maps_are_reduced_by_operations_with_a_deterministic_gradient(name):
    """On CUDA the gradient of adaptive pooling has none."""
    pairs = [["layer1", "stage1"]]  # 16x16 and 8x8
    networks = NETWORKS["resnet"](), NETWORKS["convnet"]().eval().requires_grad_(False)
    options = {"warmup": 0} if name == "reviewkd" else {}
    term = {**CLASSES, "attention": Attention}[name](pairs=pairs, **options)
    reads = term.setup(Context(*(layer_shapes(network, 16) for network in networks), 3))
    kept = term.remember(FeatureReader(networks[1], reads.teacher)(images(16)))
    with Recorded() as recorded:
        output = FeatureReader(networks[0], reads.student)(images(16))
        term(output, kept, batch()).backward()
    assert "avg_pool2d_backward" in recorded.names
    assert not any("adaptive" in name for name in recorded.names)


@pytest.mark.parametrize("name", ["FitNet", "VID", "OFD", "ReviewKD"])
def test_own_parameters_are_trained_and_resumed_but_not_part_of_the_student(name):
    half = Normalization((0.5,) * 3, (0.5,) * 3)
    teacher = FrozenTeacher(ConvNet([6, 10], 12, 3, 16), expects=half, given=half)
    node = {"_target_": "kd_lightning.models.ConvNet", "channels": [4, 8], "hidden": 8,
            "num_classes": 3, "image_size": 16}  # fmt: skip
    terms = {"term": {"_target_": f"kd_lightning.losses.{name}", "weight": 1.0}}
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.1}
    module = DistillationModule(node, terms, sgd, None, 3, 16, train_size=7, teacher=teacher)
    own = {name for name, _ in module.named_parameters() if name.startswith("terms.")}
    assert own
    assert own <= module.state_dict().keys()
    plain = ConvNet([4, 8], 8, 3, 16).state_dict().keys()
    assert module.student.state_dict().keys() == plain
    assert not any(value is parameter for value in module.parameters()
                   for parameter in teacher.model.parameters())  # fmt: skip
