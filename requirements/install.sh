#!/bin/sh
# Fills a virtual environment: requirements/install.sh VENV
#
# Run again after a failure, it goes on where it stopped. A machine that gets a GPU later wants a new VENV.
set -eu
cd "$(dirname "$0")/.."
venv=$1
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
say() { printf '\n== %s\n' "$*"; }

if nvidia-smi -L >/dev/null 2>&1; then
    # Not run yet on a machine with a GPU: see the note in cuda.txt.
    say "1/3 SGLang for CUDA with its dependencies (several GB)"
    pip install -r requirements/cuda.txt
else
    say "1/3 PyTorch for the CPU (about 200 MB), SGLang and the rest"
    # One retry with a short timeout: where the index cannot be reached but pip's own configuration names
    # another place (find-links, a mirror), the wheel is found there without minutes of waiting.
    pip install --no-deps --retries 1 --timeout 15 \
        --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu || {
        say "no CPU build of PyTorch found; installing the general one instead (about 900 MB)"
        pip install --no-deps torch==2.13.0
    }
    pip install --no-deps -r requirements/cpu.txt
fi
say "2/3 What the tests need"
pip install --no-deps -r requirements/dev.txt
say "3/3 The appliance"
pip install --no-deps --no-build-isolation -e .
