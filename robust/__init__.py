"""Train certifiably robust image classifiers, judge them, and keep what was found."""

import robust.start  # noqa: F401
from robust.checkpoint import Checkpoint, CheckpointError, load
from robust.dataset import DATASETS, parse_dataset
from robust.evaluate import evaluate
from robust.model import MODELS
from robust.objective import OBJECTIVES
from robust.report import Report
from robust.report_folder import write_report
from robust.settings import Settings, load_recipe
from robust.trainer import train

__all__ = [
    "DATASETS",
    "MODELS",
    "OBJECTIVES",
    "Checkpoint",
    "CheckpointError",
    "Report",
    "Settings",
    "evaluate",
    "load",
    "load_recipe",
    "parse_dataset",
    "train",
    "write_report",
]
