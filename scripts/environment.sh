# Sourced by the other scripts: makes .venv with the suite installed, once.
# A second run finds the stamp of setup.py and of this file, and installs nothing.

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
wanted=$("$python" -c 'import hashlib; print(hashlib.sha256(b"".join(open(f, "rb").read() for f in ("setup.py", "scripts/environment.sh"))).hexdigest())')
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing the suite into $venv (downloads PyTorch the first time) ..."
    "$python" -m pip install --quiet --disable-pip-version-check --editable '.[test]'
    # Packages that tests compare with or adapt. Without their dependencies: torchattacks pins a release of requests of
    # 2021, auto-LiRPA a torch of 2022, and robustbench a timm and more than its architectures import.
    packages="torchattacks==3.5.1 pyautoattack==0.2.0 auto-LiRPA==0.3 foolbox==3.3.4 timm"
    install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
    # shellcheck disable=SC2086
    install --no-deps $packages || for package in $packages; do
        install --no-deps "$package" ||
            echo "note: $package could not be installed; the tests that need it are skipped (remove $stamp to try again)" >&2
    done
    # By itself and last: torchattacks brings a robustbench of its own along, without the benchmark.
    install --no-deps --force-reinstall robustbench==1.1 ||
        echo "note: robustbench could not be installed; the tests that need it are skipped (remove $stamp to try again)" >&2
    # What these import; RobustBench asks setuptools for pkg_resources.
    install requests eagerpy GitPython pyyaml appdirs huggingface_hub geotorch torchdiffeq gdown pandas 'setuptools<81' ||
        echo "note: tests with RobustBench, Foolbox and the Hugging Face Hub are skipped (remove $stamp to try again)" >&2
    echo "$wanted" >"$stamp"
fi
