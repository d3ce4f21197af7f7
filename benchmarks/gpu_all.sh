#!/bin/sh
# Measures everything on a machine with one NVIDIA GPU, torch for CUDA, and no network, in calls that each end by
# themselves within LIMIT seconds, ten minutes unless set:
#
#   benchmarks/gpu_all.sh KIT OUT install     once a machine: the wheels of KIT (make_gpu_kit.sh)
#   benchmarks/gpu_all.sh KIT OUT device      partitions, bandwidth, graphs, decode floor, finetuning
#   benchmarks/gpu_all.sh KIT OUT model       writes Llama-3-8B's shapes with random weights (16 GB)
#   benchmarks/gpu_all.sh KIT OUT serve       whether SGLang starts, answers and finetunes; what stopped it if not
#   benchmarks/gpu_all.sh KIT OUT compare     the policies: begins, or waits for what a call before has begun, which
#                                             goes on by itself; call it again until it says that it is complete
#   benchmarks/gpu_all.sh KIT OUT all         one after the other, each going on when the one before failed
#
# OUT receives the JSON files and a log of each call, and OUT.tgz all of it after each; it must outlast the calls. The
# names of the splits are those of 132 SMs (H100, H200); POLICIES names others, and SLOS, LOADS, REPETITIONS and
# RUN_SECONDS measure more. Five promises take half an hour, two a third of it. Not yet run on a GPU.
set -u
self=$(realpath "$0")
kit=$(realpath -m "${1:?usage: gpu_all.sh KIT OUT STAGE}")
out=$(realpath -m "${2:?usage: gpu_all.sh KIT OUT STAGE}")
cd "$(dirname "$0")/.."
stage=${3:?usage: gpu_all.sh KIT OUT STAGE}
python=${PYTHON:-python3}
site=${SITE:-/tmp/harli-site}
model=${MODEL:-/tmp/harli-llama-3-8b}
shapes=${SHAPES:-llama-3-8b}
limit=${LIMIT:-560}
port=${PORT:-8321}
slots=${SLOTS:-131072}
policies=${POLICIES:-adaptive,static:64+68,flexllm,time_slice,serve_only}
slos=${SLOS:-2x,4x}
loads=${LOADS:-0.6}
repetitions=${REPETITIONS:-1}
seconds=${RUN_SECONDS:-20}
prompt=${PROMPT_TOKENS:-4096} answer=${ANSWER_TOKENS:-512} sequence=${SEQUENCE_TOKENS:-2048}
mkdir -p "$out"
export HARLI_HOME="${HARLI_HOME:-/tmp/harli-home}"
export PYTHONPATH="$site:$PWD" SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
export HARLI_DEVICE__ATTENTION="${ATTENTION-triton}" # what the kit has kernels for
export HARLI_MEMORY__POOL_SLOTS="$slots" # leaves room for the workspaces of every stream
export SGLANG_IS_FLASHINFER_AVAILABLE=false # the kit has a stand-in, which only can be imported
export CUDA_DEVICE_MAX_CONNECTIONS=32 # a hardware queue for each stream
export TORCH_CUDNN_SDPA_DEPRIORITIZED=1 # it is compiled anew for every length
PATH="$site/bin:$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH" # ninja may lie beside python
bounded() { # what is left of the stage's time
    seconds_left=$((began + limit - $(date +%s)))
    timeout --signal=INT --kill-after=20 $((seconds_left > 1 ? seconds_left : 1)) "$@"
}
harli() { bounded "$python" -m harli_appliance.cli.main "$@"; }

install() {
    bounded "$python" -m pip --disable-pip-version-check install -q --no-index --no-deps --no-compile \
        --upgrade --target "$site" "$kit"/*.whl && "$python" -m zipfile -e "$kit/sgl_kernel.zip" "$site"
    which nvcc ninja c++ # SGLang compiles four small kernels when it first runs
    harli doctor --json
}
device() { harli bench device --out "$out" --shapes "$shapes" --budget "$((limit - 100))"; }
model() { bounded "$python" -m harli_appliance.bench.random_model "$shapes" "$model"; }
serve() {
    export HARLI_URL="http://127.0.0.1:$port"
    "$python" -m harli_appliance.cli.main serve --port "$port" --model "$model" \
        --set logging.level=debug 2>"$out/serve.stderr" &
    server=$!
    trap 'kill "$server" 2>/dev/null' EXIT
    until harli status --json >"$out/status-started.json" 2>/dev/null; do
        if [ $((began + limit - $(date +%s))) -lt 60 ] || ! kill -0 "$server" 2>/dev/null; then
            echo "it did not start in time; the last lines of what it said:"
            tail -n 60 "$out/serve.stderr"
            kill "$server" 2>/dev/null
            return 1
        fi
        sleep 2
    done
    harli run "Say hello" --max-tokens 32 --temperature 0 &&
        harli jobs create harli_appliance/bench/demo_data/lesson.jsonl --epochs 1 --wait
    code=$?
    harli status --json >"$out/status-ended.json"
    harli status
    kill -INT "$server" && wait "$server"
    return $code
}
compare() {
    if [ ! -e "$out/compare.pid" ] || ! kill -0 "$(cat "$out/compare.pid")" 2>/dev/null; then
        setsid sh "$self" "$kit" "$out" compare-run >"$out/compare-run.log" 2>&1 &
        echo $! >"$out/compare.pid"
    fi
    waited=0
    while kill -0 "$(cat "$out/compare.pid")" 2>/dev/null && [ $waited -lt $((limit - 20)) ]; do
        sleep 5
        waited=$((waited + 5))
    done
    tail -n 40 "$out/compare-run.log"
    kill -0 "$(cat "$out/compare.pid")" 2>/dev/null && echo "it goes on; call again to wait for it"
    [ -e "$out/compare/report.json" ] && echo "it is complete"
}
compare_run() {
    resume=
    [ -e "$out/compare/plan.json" ] && resume=--resume
    # shellcheck disable=SC2086 # one flag or none
    "$python" -m harli_appliance.cli.main bench run --model "$model" --out "$out/compare" $resume --policies "$policies" --slo-tpot "$slos" \
        --loads "$loads" --repetitions "$repetitions" --seconds "$seconds" --prompt-scale 1 --output-scale 1 \
        --max-prompt-tokens "$prompt" --max-output-tokens "$answer" --sequence-tokens "$sequence"
}
logged() {
    echo "== $1"
    began=$(date +%s)
    "$1" >"$out/$1.log" 2>&1
    code=$?
    tail -n 40 "$out/$1.log"
    echo "== $1 ended with $code (all of it: $out/$1.log)"
    tar czf "$out.tgz" -C "$(dirname "$out")" "$(basename "$out")"
    return $code
}
case $stage in
install | device | model | serve | compare) logged "$stage" ;;
compare-run) compare_run ;;
all)
    failed=0
    for each in install device model serve compare; do logged "$each" || failed=1; done
    exit $failed
    ;;
*)
    echo "gpu_all.sh: no stage '$stage'" >&2
    exit 2
    ;;
esac
