# `make help` lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(if $(wildcard /proc/driver/nvidia/version),gpu,cpu)

.DEFAULT_GOAL := help
.PHONY: help install run best gate release serve peers test check

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

install: $(VENV)/installed ## make .venv and install the pinned dependencies

$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python found. On Debian 12 or Ubuntu 24.04: apt install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
	  || { echo "$(PYTHON) is $$($(PYTHON) -V); Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Installing into $(VENV) (several minutes the first time) ..."
	@$(PYTHON) -m venv $(VENV) || { echo "On Debian or Ubuntu: apt install $(notdir $(PYTHON))-venv"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[$(RUNTIME),serve,dev]'
ifeq ($(RUNTIME),gpu)
	@# onnxruntime-genai asks for onnxruntime, whose files are those of onnxruntime-gpu without CUDA.
	$(BIN)/python -m pip uninstall -q -y onnxruntime onnxruntime-gpu
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps "$$(grep -o 'onnxruntime-gpu==[0-9.]*' pyproject.toml)"
endif
	@touch $@

run: install ## go through every stage that is not up to date; with an NVIDIA driver, on the GPU too
	PATH="$(CURDIR)/$(BIN):$$PATH" dvc repro
ifeq ($(RUNTIME),gpu)
	export PATH="$(CURDIR)/$(BIN):$$PATH"; dvc repro --keep-going pipeline/cuda/dvc.yaml; status=$$?; \
	  dvc repro -f -s cost report && exit $$status
endif

best: install ## train without the time limit, best on a GPU, as the DVC experiment `best` (commit first)
	PATH="$(CURDIR)/$(BIN):$$PATH" dvc exp run --temp -f -n best \
	  -S prepare.requests=60000 -S train.epochs=2 -S train.frozen_layers=0 -S train.tokens_per_step=3000
	PATH="$(CURDIR)/$(BIN):$$PATH" dvc exp diff HEAD best

gate: install ## fail unless a variant passes the rules of params.yaml's report section
	$(BIN)/python -m pipeline.report report.gate=true

release: install ## write models/release: the recommended variant with model card and hashes
	$(BIN)/python -m pipeline.release

serve: install ## serve models/int8 at http://127.0.0.1:8080 to agents (Anthropic's and OpenAI's API)
	$(BIN)/python -m pipeline.serve

peers: install ## measure llama.cpp, OpenVINO and others beside ours: reports/peers.md
	$(BIN)/python -m pipeline.peers

test: install ## pass every test
	$(BIN)/python -m pytest

check: install ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
