# Every target sets up what it needs: a virtual environment in .venv, from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint slow format soundness uniqueness boxes mutants evaluations kernels bench clean

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

# On all cores; torch takes one thread in each.
test: lint
	$(BIN)/pytest -n auto

slow: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tune]'
	$(BIN)/pytest -m slow

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

soundness: .venv/installed
	$(BIN)/python benchmarks/soundness.py --samples 200000 --workers 2 --output benchmarks/results/soundness.json

uniqueness: .venv/installed
	$(BIN)/python benchmarks/uniqueness.py --maps 21000 --output benchmarks/results/uniqueness.json

boxes: .venv/installed
	$(BIN)/python benchmarks/boxes.py --samples 100000 --output benchmarks/results/boxes.json

# Every bound made 1 % too good, one at a time: some test must notice.
mutants: .venv/installed
	$(BIN)/python benchmarks/mutants.py --output benchmarks/results/mutants.json

evaluations: .venv/installed
	$(BIN)/python benchmarks/evaluations.py --output benchmarks/results/evaluations.json

# DATA=DIR names a folder with MNIST.
kernels: .venv/installed
	$(BIN)/python benchmarks/kernels.py $(if $(DATA),--data-dir $(DATA)) --output benchmarks/results/kernels.json

# Beside torchdeq, which only this needs. About forty minutes; DATA=DIR names a folder with MNIST.
bench: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/speed.py --output benchmarks/results/speed.json
	$(BIN)/python benchmarks/scaling.py --output benchmarks/results/scaling.json
	$(BIN)/python benchmarks/training.py $(if $(DATA),--data-dir $(DATA)) --output benchmarks/results/training.json
	$(BIN)/python benchmarks/report.py benchmarks/results

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
