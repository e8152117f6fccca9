"""Decide robustness with a proof: bounds, verdicts and verifiers for `torch.nn.Module`."""

from certify.bounds.bound import BOUNDS, Bounds, bound
from certify.bounds.global_l2 import global_l2_radius
from certify.graph import Graph, Snapshot
from certify.leaf import leaf_lp
from certify.lipschitz.global_constant import global_lipschitz
from certify.lipschitz.local import LipschitzBound, jacobian_bounds, local_lipschitz, monotone_features
from certify.lipschitz.operator_norm import operator_norm_bound
from certify.lipschitz.radius import certified_radius
from certify.op import UnsupportedOp
from certify.spec import margin_spec
from certify.tracing import CaptureError, capture
from certify.verdict import SoundnessError, Verdict, check_witness, falsified
from certify.verifier import VERIFIERS, Verifier
from certify.verifiers.alpha_crown import AlphaCROWN
from certify.verifiers.cascade import Cascade
from certify.verifiers.crown import CROWN
from certify.verifiers.crown_ibp import CROWNIBP
from certify.verifiers.global_l2 import GlobalL2
from certify.verifiers.ibp import IBP
from certify.verifiers.lipschitz_margin import LipschitzMargin
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
    "GlobalL2",
    "Graph",
    "LipschitzBound",
    "LipschitzMargin",
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
    "global_l2_radius",
    "global_lipschitz",
    "jacobian_bounds",
    "leaf_lp",
    "local_lipschitz",
    "margin_spec",
    "monotone_features",
    "operator_norm_bound",
]
