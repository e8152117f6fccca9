"""Attacks on image classifiers: each proposes points inside a threat model and leaves the judging to others."""

from attacks.attack import ATTACKS, Attack, as_foolbox_attack, as_torchattack
from attacks.methods.apgd import APGD, APGDT
from attacks.methods.autoattack import AutoAttack
from attacks.methods.beta import BETA
from attacks.methods.carlini_wagner import CarliniWagner
from attacks.methods.deepfool import DeepFool
from attacks.methods.fab import FAB
from attacks.methods.fgsm import FGSM
from attacks.methods.foolbox_adapter import Foolbox
from attacks.methods.margin_pgd import MarginPGD
from attacks.methods.mifgsm import MIFGSM
from attacks.methods.pgd import PGD
from attacks.methods.square import Square
from attacks.methods.torchattacks_adapter import Torchattacks
from attacks.nearest import Nearest
from attacks.online import virtual_plus
from attacks.standard_evaluation import StandardEvaluation
from attacks.threat import Ball, L1Ball, L2Ball, LinfBall, make_ball

__all__ = [
    "APGD",
    "APGDT",
    "ATTACKS",
    "BETA",
    "FAB",
    "FGSM",
    "MIFGSM",
    "PGD",
    "Attack",
    "AutoAttack",
    "Ball",
    "CarliniWagner",
    "DeepFool",
    "Foolbox",
    "L1Ball",
    "L2Ball",
    "LinfBall",
    "MarginPGD",
    "Nearest",
    "Square",
    "StandardEvaluation",
    "Torchattacks",
    "as_foolbox_attack",
    "as_torchattack",
    "make_ball",
    "virtual_plus",
]
