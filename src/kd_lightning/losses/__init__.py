"""Loss terms, the building blocks of methods, one per file."""

from kd_lightning.losses.attention import Attention
from kd_lightning.losses.crd import CRD
from kd_lightning.losses.cross_entropy import CrossEntropy
from kd_lightning.losses.dist import DIST
from kd_lightning.losses.dkd import DKD
from kd_lightning.losses.fitnet import FitNet
from kd_lightning.losses.hard import HardLabel
from kd_lightning.losses.logit import Logit
from kd_lightning.losses.logit_term import LogitTerm
from kd_lightning.losses.map_term import MapTerm
from kd_lightning.losses.mlkd import MLKD
from kd_lightning.losses.nkd import NKD
from kd_lightning.losses.nst import NST
from kd_lightning.losses.ofd import OFD
from kd_lightning.losses.own_teacher import OwnTeacher
from kd_lightning.losses.pkt import PKT
from kd_lightning.losses.reviewkd import ReviewKD
from kd_lightning.losses.rkd import RKD
from kd_lightning.losses.simkd import SimKD
from kd_lightning.losses.sp import SP
from kd_lightning.losses.term import Context, Reads, Targets, Term, TermBatch
from kd_lightning.losses.tfkd import TfKD
from kd_lightning.losses.vid import VID

__all__ = [
    "CRD",
    "DIST",
    "DKD",
    "MLKD",
    "NKD",
    "NST",
    "OFD",
    "PKT",
    "RKD",
    "SP",
    "VID",
    "Attention",
    "Context",
    "CrossEntropy",
    "FitNet",
    "HardLabel",
    "Logit",
    "LogitTerm",
    "MapTerm",
    "OwnTeacher",
    "Reads",
    "ReviewKD",
    "SimKD",
    "Targets",
    "Term",
    "TermBatch",
    "TfKD",
]
