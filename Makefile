# The front door. `make demo` and `make test` install all they need into .venv.

PYTHON ?= python3.11
BIN := .venv/bin
# Wheels only, exact versions. torch comes first: elsewhere its index decides CPU or CUDA.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo serve test faults check bench clean

demo: .venv/.demo
	$(BIN)/python examples/demo.py

serve: .venv/.demo
	$(BIN)/darkroom serve

# The tests that start servers run one after another; the rest on all cores. Where the machine is busy, a
# client's own ten seconds can run out: what failed there is tried once more, and the summary says so.
SERVERS := tests/serve tests/clients tests/faults/test_live_server.py tests/faults/test_server_killed.py

test: .venv/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal $(addprefix --ignore=,$(SERVERS))
	$(BIN)/python -m pytest --reruns 1 $(SERVERS)

# The long form of what `make test` does in short: see docs/reliability.md.
faults: .venv/.dev
	DARKROOM_FAULTS=5 $(BIN)/python -m pytest tests/faults

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
