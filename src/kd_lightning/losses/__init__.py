"""Loss terms, the building blocks of methods, one per file."""

from kd_lightning.losses.attention import Attention
from kd_lightning.losses.crd import CRD
from kd_lightning.losses.cross_entropy import CrossEntropy
from kd_lightning.losses.dist import DIST
from kd_lightning.losses.dkd import DKD
from kd_lightning.losses.hard import HardLabel
from kd_lightning.losses.logit import Logit
from kd_lightning.losses.logit_term import LogitTerm
from kd_lightning.losses.mlkd import MLKD
from kd_lightning.losses.nkd import NKD
from kd_lightning.losses.pkt import PKT
from kd_lightning.losses.rkd import RKD
from kd_lightning.losses.sp import SP
from kd_lightning.losses.term import Context, Reads, Targets, Term, TermBatch
from kd_lightning.losses.tfkd import TfKD

__all__ = [
    "CRD",
    "DIST",
    "DKD",
    "MLKD",
    "NKD",
    "PKT",
    "RKD",
    "SP",
    "Attention",
    "Context",
    "CrossEntropy",
    "HardLabel",
    "Logit",
    "LogitTerm",
    "Reads",
    "Targets",
    "Term",
    "TermBatch",
    "TfKD",
]
