#!/bin/sh
# Collects wheels for a GPU machine that has torch for CUDA but cannot reach a package index:
#
#   benchmarks/make_gpu_kit.sh KIT
#
# The kernel package is cut down to its Hopper operators and those for SM partitions (15 MiB of 365): without
# FlashAttention 3, so gpu_all.sh serves with Triton's attention. Kernels 0.4.5 are the build for torch 2.11, 0.4.7 for
# 2.13: KERNELS=0.4.7 takes those. Not yet run on a GPU.
set -eu
kit=$(realpath -m "${1:?usage: make_gpu_kit.sh KIT}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
target=${TARGET:-3.12}
kernels=${KERNELS:-0.4.5}
mkdir -p "$kit"
platforms=
for glibc in 39 35 34 31 28 27 24 17; do platforms="$platforms --platform manylinux_2_${glibc}_x86_64"; done
platforms="$platforms --platform manylinux2014_x86_64 --platform manylinux1_x86_64"
get() {
    # shellcheck disable=SC2086 # a list of flags
    "$python" -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: \
        --python-version "$target" --implementation cp $platforms "$@"
}
get -d "$kit" sglang==0.5.21
get -d "$kit" -r benchmarks/gpu_kit.txt
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
get --abi abi3 --abi none -d "$scratch" "sglang-kernel==$kernels"
"$python" - "$scratch" "$kit/sgl_kernel.zip" <<'PY'
import sys
import zipfile
from pathlib import Path

source = next(Path(sys.argv[1]).glob("*.whl"))
dropped = ("flash_ops", "flashmla_ops", "infllm_ops", "sm100/")
SAMPLING = """\
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*a, **k):
        raise NotImplementedError(name)

    return missing
"""
with zipfile.ZipFile(source) as wheel, zipfile.ZipFile(sys.argv[2], "w", zipfile.ZIP_DEFLATED, compresslevel=9) as kit:
    for entry in wheel.infolist():
        if not any(part in entry.filename for part in dropped):
            kit.writestr(entry, wheel.read(entry.filename))
    # SGLang imports these whatever it uses of them. FlashInfer is 18 MB; gpu_all.sh tells SGLang to do without.
    kit.writestr("IPython/__init__.py", "")
    kit.writestr("IPython/display.py", "HTML = display = None\n")
    kit.writestr("flashinfer/__init__.py", "def bmm_fp8(*a, **k):\n    raise NotImplementedError\n")
    kit.writestr("flashinfer/sampling.py", SAMPLING)
PY
du -sh "$kit"
