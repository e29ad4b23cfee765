# Every target sets up what it needs: a virtual environment in .venv, from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint slow format soundness evaluations clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/perron fit digits
	$(BIN)/perron test digits
	$(BIN)/perron certify digits

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

slow: .venv/installed
	$(BIN)/pytest -m slow

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

soundness: .venv/installed
	$(BIN)/python benchmarks/soundness.py --samples 40000 --output benchmarks/results/soundness.json

evaluations: .venv/installed
	$(BIN)/python benchmarks/evaluations.py --output benchmarks/results/evaluations.json

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
