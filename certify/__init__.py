"""Decide robustness with a proof: bounds, verdicts and verifiers for `torch.nn.Module`."""

from certify.bounds.bound import BOUNDS, Bounds, bound
from certify.bounds.global_l2 import certified_radius
from certify.graph import CaptureError, Graph, Snapshot, capture
from certify.op import UnsupportedOp
from certify.spec import margin_spec
from certify.verdict import SoundnessError, Verdict, check_witness, falsified
from certify.verifier import VERIFIERS, Verifier
from certify.verifiers.alpha_crown import AlphaCROWN
from certify.verifiers.cascade import Cascade
from certify.verifiers.crown import CROWN
from certify.verifiers.crown_ibp import CROWNIBP
from certify.verifiers.global_l2 import GlobalL2
from certify.verifiers.ibp import IBP

__all__ = [
    "BOUNDS",
    "CROWN",
    "CROWNIBP",
    "IBP",
    "VERIFIERS",
    "AlphaCROWN",
    "Bounds",
    "CaptureError",
    "Cascade",
    "GlobalL2",
    "Graph",
    "Snapshot",
    "SoundnessError",
    "UnsupportedOp",
    "Verdict",
    "Verifier",
    "bound",
    "capture",
    "certified_radius",
    "check_witness",
    "falsified",
    "margin_spec",
]
