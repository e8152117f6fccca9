"""The package's first import: a process that is the command answers signals through its seconds of further imports."""

import sys
from pathlib import Path

from robust.interruption import leave_at_a_signal

# "-m" is what Python has there until it has found the module that `python -m NAME` means, which may be a user's own.
if Path(sys.argv[0]).stem == "robust" or (sys.argv[0] == "-m" and "robust" in sys.orig_argv):
    leave_at_a_signal("robust")
