#!/usr/bin/env bash
# GPU tests and benchmark on a machine with PyTorch, Triton, pytest, pytest-timeout, hypothesis and tqdm, without a package
# registry. vLLM must be importable (PYTHONPATH); where it is not, the kernels alone are tested and measured.
#   tools/bare_gpu.sh test                  correctness
#   tools/bare_gpu.sh bench [options]       correctness unless it has passed just before, then benchmarks.gpu with the options
# A copy of the results goes to $OUT, if that is set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

what=${1:?test or bench}
shift
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 DO_NOT_TRACK=1 VLLM_NO_USAGE_STATS=1

# vLLM finds plugins by the metadata of installed distributions; pip may not be able to build here.
metadata=$(mktemp -d)
python3 - "$metadata" <<'PY'
import pathlib, sys, tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
folder = pathlib.Path(sys.argv[1]) / f"vllm_d2cache-{project['version']}.dist-info"
folder.mkdir()
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
groups = project["entry-points"].items()
lines = [line for group, names in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in names.items()))]
(folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
PY
export PYTHONPATH=$PWD:$metadata${PYTHONPATH:+:$PYTHONPATH}

kernels_alone=false
if ! python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'; then
    echo 'vLLM cannot be imported: kernels alone' >&2
    kernels_alone=true
fi

status=0
case $what in
test) python3 tools/test_gpu.py $($kernels_alone && echo --no-engine) "$@" || status=$? ;;
bench) python3 -m benchmarks.gpu $($kernels_alone && echo --parts kernels) "$@" || status=$? ;;
*) echo "unknown: $what (test or bench)" >&2; exit 2 ;;
esac
if [ -n "${OUT:-}" ]; then
    for file in benchmarks/results/gpu.json benchmarks/results/gpu.png docs/performance.md build/gpu_tests_passed.json; do
        if [ -e "$file" ]; then cp "$file" "$OUT"/; fi
    done
fi
exit "$status"
