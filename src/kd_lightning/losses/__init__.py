"""The terms that methods are made of, one idea per file."""

from kd_lightning.losses.attention import Attention
from kd_lightning.losses.cross_entropy import CrossEntropy
from kd_lightning.losses.logit import Logit
from kd_lightning.losses.term import Term

__all__ = ["Attention", "CrossEntropy", "Logit", "Term"]
