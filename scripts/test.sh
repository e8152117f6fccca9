#!/usr/bin/env bash
# Lint, types and tests. Arguments go to pytest, for example: scripts/test.sh -m slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check --quiet .
"$python" -m mypy
if [ $# -eq 0 ]; then
    set -- -m "not slow"
fi
# One worker a core, one thread a worker: the small nets of the tests gain nothing from more.
OMP_NUM_THREADS=1 exec "$python" -m pytest -n auto --dist worksteal "$@"
