"""The package's first import: a process that is the command answers signals through its seconds of further imports."""

import sys
from pathlib import Path

from robust.interruption import leave_at_a_signal

# "-m" is what Python has there until it has found the module that `python -m robust` names.
if Path(sys.argv[0]).stem in ("-m", "robust"):
    leave_at_a_signal("robust")
