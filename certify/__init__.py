"""Decide robustness with a proof: bounds, verdicts and verifiers for `torch.nn.Module`."""

from certify.bounds.bound import BOUNDS, Bounds, bound
from certify.graph import CaptureError, Graph, Snapshot, capture
from certify.op import UnsupportedOp
from certify.spec import margin_spec

__all__ = ["BOUNDS", "Bounds", "CaptureError", "Graph", "Snapshot", "UnsupportedOp", "bound", "capture", "margin_spec"]
