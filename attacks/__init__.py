"""Attacks on image classifiers: each proposes points inside a threat model and leaves the judging to others."""

from attacks.attack import ATTACKS, Attack, as_torchattack
from attacks.methods.apgd import APGD, APGDT
from attacks.methods.fgsm import FGSM
from attacks.methods.margin_pgd import MarginPGD
from attacks.methods.mifgsm import MIFGSM
from attacks.methods.pgd import PGD
from attacks.threat import Ball, L1Ball, L2Ball, LinfBall, make_ball

__all__ = [
    "APGD",
    "APGDT",
    "ATTACKS",
    "FGSM",
    "MIFGSM",
    "PGD",
    "Attack",
    "Ball",
    "L1Ball",
    "L2Ball",
    "LinfBall",
    "MarginPGD",
    "as_torchattack",
    "make_ball",
]
