"""Attacks on image classifiers: each proposes points inside a threat model and leaves the judging to others."""

from attacks.threat import Ball, L1Ball, L2Ball, LinfBall, make_ball

__all__ = ["Ball", "L1Ball", "L2Ball", "LinfBall", "make_ball"]
