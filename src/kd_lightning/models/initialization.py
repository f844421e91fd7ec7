"""Initial weights of convolutions."""

from torch import nn


def init_convolutions(model: nn.Module) -> None:
    """Initialise all convolutions for ReLU, by their number of outputs (He et al. 2015, section
    2.2, "backward propagation case"); biases are 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
