#!/usr/bin/env bash
# Train a certifiably robust classifier on the embedded digits, certify it, and show where the report is.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

out=${1:-runs/demo}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # small nets gain nothing from more threads, and lose much on a busy machine
"$venv/bin/robust" train --recipe digits_mtl_ibp --out "$out"
"$venv/bin/robust" certify "$out/checkpoint.safetensors" --out "$out/report"
