"""`python -m robust` is the command `robust`."""

import sys

from robust.cli import main

sys.exit(main())
