# Sourced by the other scripts: makes .venv with the suite installed, once.
# A second run finds the stamp of setup.py and installs nothing.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
venv=${ROBUST_VENV:-$root/.venv}
python=$venv/bin/python
stamp=$venv/.robust-installed

if [ ! -x "$python" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or later is needed; set PYTHON to its command." >&2
        exit 1
    }
    "${PYTHON:-python3}" -m venv "$venv"
fi
wanted=$("$python" -c 'import hashlib; print(hashlib.sha256(open("setup.py", "rb").read()).hexdigest())')
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing the suite into $venv (downloads PyTorch the first time) ..."
    "$python" -m pip install --quiet --disable-pip-version-check --editable '.[test]'
    echo "$wanted" >"$stamp"
fi
