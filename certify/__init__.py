"""Decide robustness with a proof: bounds, verdicts and verifiers for `torch.nn.Module`."""

from certify.bounds.bound import BOUNDS, Bounds, bound
from certify.graph import CaptureError, Graph, Snapshot, capture
from certify.leaf import leaf_lp
from certify.op import UnsupportedOp
from certify.spec import margin_spec
from certify.verdict import SoundnessError, Verdict, check_witness, falsified
from certify.verifier import VERIFIERS, Verifier
from certify.verifiers.alpha_crown import AlphaCROWN
from certify.verifiers.cascade import Cascade
from certify.verifiers.crown import CROWN
from certify.verifiers.crown_ibp import CROWNIBP
from certify.verifiers.ibp import IBP
from certify.verifiers.milp import MILP

__all__ = [
    "BOUNDS",
    "CROWN",
    "CROWNIBP",
    "IBP",
    "MILP",
    "VERIFIERS",
    "AlphaCROWN",
    "Bounds",
    "CaptureError",
    "Cascade",
    "Graph",
    "Snapshot",
    "SoundnessError",
    "UnsupportedOp",
    "Verdict",
    "Verifier",
    "bound",
    "capture",
    "check_witness",
    "falsified",
    "leaf_lp",
    "margin_spec",
]
