# Everything runs in a virtual environment that tools/make_env.py builds and keeps up to date; `make help` lists all.
#   PYTHON   a Python 3.11, 3.12 or 3.13 to build it with (default: the first of python3, python3.13, ... that is one)
#   VENV     its directory (default: .venv)
#   BACKEND  auto, cpu or cuda: the build of vLLM (default: auto, by the GPU)
#   VLLM     a release of vLLM, such as 0.31.0 (default: that of an existing environment, else the newest)

VENV ?= .venv
TASKS ?= gsm8k,humaneval
BACKEND ?= auto
ifndef PYTHON
  supported := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
  PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c '$(supported)' 2>/dev/null && { command -v "$$p"; break; }; done)
endif

bin := $(VENV)/bin
# Tests need no network, little memory for the KV cache, and one thread: the models are tiny. Serving has none of this.
test_env := HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 DO_NOT_TRACK=1 VLLM_NO_USAGE_STATS=1
# Clients of the server have an environment of their own, without torch and vLLM.
clients := $(test_env) OMP_NUM_THREADS=1 SERVER_COMMAND=$(abspath $(bin))/vllm \
  .venv-clients/bin/python -m pytest --confcutdir=tests/clients
pytest := $(test_env) OMP_NUM_THREADS=1 $(bin)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help env demo test test-matrix test-cuda-wheels unit properties engine kernels test-gpu lint docs format clients fuzz bench bench-gpu
.PHONY: count load eval reproduce claims rehearse train dist clean long

help:  ## show this list
	@echo 'make TARGET [PYTHON=python3.12] [VENV=.venv] [BACKEND=auto|cpu|cuda] [VLLM=0.31.0]'
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  \1\t\2/p' $(MAKEFILE_LIST)

env:  ## build the environment, or bring it up to date (no effect when nothing has changed)
	@test -n "$(PYTHON)" || \
	  { echo 'No Python 3.11 to 3.13 found; name one: make env PYTHON=/path/to/python3.12' >&2; exit 1; }
	@"$(PYTHON)" tools/make_env.py --backend $(BACKEND) $(if $(VLLM),--vllm $(VLLM)) $(VENV)

demo: env  ## serve the tiny checkpoint with `vllm serve` and compare d2Cache with full recompute
	@$(bin)/python tools/demo.py

test: lint unit kernels properties engine clients  ## all tests, in this order (many minutes)

test-matrix:  ## the suite on every supported vLLM with a CPU build, an environment each, and a table (ARGS=0.31.0: one)
	"$(PYTHON)" tools/test_matrix.py $(ARGS)

test-cuda-wheels:  ## on the newest CUDA builds of vLLM, what needs no GPU, an environment each (9 GB), and a table (ARGS=0.33.0: one)
	"$(PYTHON)" tools/test_cuda_wheels.py $(ARGS)

unit: env  ## tests that need neither vLLM nor a GPU, but for the long ones (under a minute)
	$(pytest) -n auto tests/unit tests/ops -m "not hypothesis and not slow and not vllm and not gpu"

properties: env  ## the long ones of these: property tests and many runs (minutes)
	$(pytest) -n auto tests/unit tests/ops -m "(hypothesis or slow) and not vllm and not gpu"

engine: env  ## tests inside vLLM, and end to end in an engine and a server (many minutes)
	$(pytest) -n auto --dist loadfile tests/vllm
	$(pytest) -n auto --maxprocesses 4 --dist loadgroup tests/e2e -m "not long"

long: env  ## end to end tests of more than a minute, which make test leaves out: two engines behind one server
	$(pytest) tests/e2e -m long

kernels: env  ## Triton kernels against their PyTorch twins in the interpreter, compiled for sm_80 to sm_120, and by warps (minutes)
	TRITON_INTERPRET=1 $(pytest) -n auto tests/triton --ignore tests/triton/test_compiles_for_hopper.py \
	  --ignore tests/triton/test_warm_up.py --ignore tests/triton/test_ptx.py --ignore tests/triton/test_warps.py
	$(pytest) -n auto tests/triton/test_compiles_for_hopper.py tests/triton/test_warm_up.py tests/triton/test_ptx.py \
	  tests/triton/test_warps.py

test-gpu: env  ## kernels and engine on a GPU, real shapes included (fails if there is one and nothing ran on it)
	$(test_env) $(bin)/python tools/test_gpu.py

lint: env  ## ruff (errors, import order, format), mypy, and names in documents that lead nowhere
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/python -m mypy
	$(bin)/python tools/check_docs.py

docs:  ## the documentation site, into out/site; a link that leads nowhere fails (an environment of its own)
	@"$(PYTHON)" tools/make_docs_env.py
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

format: env  ## apply ruff's fixes and format
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

bench: env  ## CPU benchmark of a step, of bidirectional and of block-diffusion families
	$(test_env) $(bin)/python -m benchmarks.cpu.step_speed
	$(test_env) $(bin)/python -m benchmarks.cpu.block_speed

count: env  ## what a step asks of a GPU, counted without one: kernels and waits, programs and registers (minutes)
	$(bin)/python -m benchmarks.count $(ARGS)
	$(bin)/python -m benchmarks.count.grid

bench-gpu: env  ## GPU benchmark: correctness, ceilings of the card, kernels, engine steps
	$(test_env) $(bin)/python -m benchmarks.gpu

.PHONY: clients-env
clients-env: env
	@$(bin)/python tools/make_clients_env.py $(VENV)

clients: clients-env  ## clients that others wrote and requests that nobody would write, against a real server (minutes)
	$(clients) tests/clients

fuzz: clients-env  ## other such requests each time, and more of them (half an hour)
	HYPOTHESIS_PROFILE=fuzz $(clients) tests/clients/test_server_fuzz.py

dist: env  ## wheel and sdist into dist/, installed into an empty environment and served from there (a minute or two)
	DO_NOT_TRACK=1 $(bin)/python tools/dist.py $(ARGS)

eval: clients-env  ## lm-evaluation-harness over the server: scores and costs (ARGS='--help' lists options)
	DO_NOT_TRACK=1 VLLM_NO_USAGE_STATS=1 $(bin)/python -m benchmarks.quality $(ARGS)

reproduce: clients-env  ## the paper's settings from local files (MODEL=DIR TASKS=gsm8k,humaneval DATA=DIR; goes on after a break)
	DO_NOT_TRACK=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 $(bin)/python -m benchmarks.reproduce \
	  --model "$(MODEL)" --tasks "$(TASKS)" --data "$(DATA)" $(ARGS)

claims: env  ## what papers say of caches and decoding, tried on the small checkpoint: tables and pictures (half an hour)
	$(test_env) $(bin)/python -m benchmarks.claims $(ARGS)

rehearse: env  ## a checkpoint of real size with weights of chance: written, served, asked, memory counted (many minutes)
	HF_HUB_OFFLINE=1 DO_NOT_TRACK=1 $(bin)/python -m benchmarks.rehearsal $(ARGS)

load: env  ## 2,000 mixed requests at 64 concurrent against a server, each answer checked (many minutes on CPU)
	$(test_env) OMP_NUM_THREADS=1 $(bin)/python -m benchmarks.load --out benchmarks/results/load $(ARGS)

train: env  ## train a tiny LLaDA from nothing into out/, on CPU (hours); the one in models/ has had more (its README)
	$(bin)/python tools/train_tiny.py --out out/tiny-llada --steps 6000

clean:  ## remove caches and build outputs; the environment stays
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
