#!/usr/bin/env bash
# GPU tests and benchmark on a machine with PyTorch, Triton, pytest and hypothesis, and without a package registry.
#   SITE=FOLDER tools/bare_gpu.sh [options of benchmarks.gpu]
# FOLDER holds vLLM and what it needs, unpacked; without it the kernels alone are tested and measured.
# Results: benchmarks/results/gpu.json and gpu.png, and the profile in docs/performance.md; a copy in $OUT if that is set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 DO_NOT_TRACK=1 VLLM_NO_USAGE_STATS=1
parts=()
if [ -n "${SITE:-}" ]; then
    # vLLM finds the plugin by its installed metadata.
    plugin=$(mktemp -d)
    python3 -m pip install --quiet --no-deps --no-index --no-build-isolation --target "$plugin" .
    export PYTHONPATH=$PWD:$plugin:$SITE
else
    echo 'SITE is not set: kernels alone' >&2
    export PYTHONPATH=$PWD
    parts=(--parts kernels)
fi
status=0
python3 -m benchmarks.gpu "${parts[@]}" "$@" || status=$?
if [ -n "${OUT:-}" ]; then
    cp benchmarks/results/gpu.json benchmarks/results/gpu.png docs/performance.md "$OUT"/ || true
fi
exit "$status"
