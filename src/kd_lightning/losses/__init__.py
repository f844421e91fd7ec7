"""Loss terms, the building blocks of methods, one per file."""

from kd_lightning.losses.attention import Attention
from kd_lightning.losses.cross_entropy import CrossEntropy
from kd_lightning.losses.logit import Logit
from kd_lightning.losses.term import Context, Reads, Targets, Term, TermBatch

__all__ = ["Attention", "Context", "CrossEntropy", "Logit", "Reads", "Targets", "Term", "TermBatch"]
