# The front door. `make demo` and `make test` install all they need into .venv.

PYTHON ?= python3.11
BIN := .venv/bin
# Wheels only, exact versions. torch comes first: elsewhere its index decides CPU or CUDA.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo serve test fuzz coverage check bench clean

demo: .venv/.demo
	$(BIN)/python examples/demo.py

serve: .venv/.demo
	$(BIN)/darkroom serve

# The tests that start servers run one after another; the rest on all cores. Where the machine is busy, a
# client's own ten seconds can run out: what failed there is tried once more, and the summary says so.
SERVERS := tests/serve tests/clients tests/faults

test: .venv/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal $(addprefix --ignore=,$(SERVERS))
	$(BIN)/python -m pytest --reruns 1 $(SERVERS)

# What reads strangers' bytes, for as many examples as DARKROOM_FUZZ says, and the queue, for a twentieth as many
# sequences of its verbs.
fuzz: export DARKROOM_FUZZ ?= 20000
fuzz: .venv/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal tests/fuzz tests/contract/test_queue_machine.py

# What guards, keeps and loads (the list is in pyproject.toml), run by its tests line by line: all of it, or fail.
COVERING := tests/contract tests/gateway tests/fuzz tests/unit/deployments tests/unit/schemas \
	tests/unit/pipelines/test_tensor_file.py tests/unit/pipelines/test_hostile_weights.py

coverage: .venv/.dev
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -n auto --dist worksteal $(COVERING)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/architecture

bench: .venv/.bench
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv out

.venv/.python:
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.worker: pyproject.toml constraints.txt | .venv/.python
	@echo "installing torch and the model libraries (a few minutes the first time)"
	$(PIP) torch
	$(PIP) --editable '.[worker]'
	@touch $@

.venv/.demo: .venv/.worker
	$(PIP) --editable '.[worker,demo]'
	@touch $@

.venv/.dev: .venv/.worker
	@echo "installing the test tools"
	$(PIP) --editable '.[worker,demo,dev]'
	@touch $@

.venv/.bench: .venv/.dev
	$(PIP) --editable '.[worker,demo,dev,bench]'
	@touch $@
