#!/usr/bin/env bash
# The documentation as web pages: README.md as the front page, and a page for every module. Opens without a server and
# asks nothing of the network. An argument names the folder (default: site/).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

"$python" -c 'import pdoc' 2>/dev/null || "$python" -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
exec "$python" scripts/site/build.py "$@"
