# The front door. `make demo` and `make test` install all they need into .venv.

PYTHON ?= python3.11
BIN := .venv/bin
# Wheels only, exact versions. torch comes first: elsewhere its index decides CPU or CUDA.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo serve test fuzz coverage faults check docs bench manifests lock audit sbom clean

demo: .venv/.demo
	$(BIN)/python examples/demo.py

serve: .venv/.demo
	$(BIN)/darkroom serve

# The tests that start servers run one after another; the rest on all cores. Where the machine is busy, a time limit
# can run out that has nothing to do with the test: what failed is tried once more, and named at the end.
SERVERS := tests/serve tests/clients tests/faults/test_live_server.py \
	tests/faults/test_server_killed.py tests/faults/test_nodes.py

test: .venv/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal --reruns 1 -rR $(addprefix --ignore=,$(SERVERS))
	$(BIN)/python -m pytest --reruns 1 -rR $(SERVERS)

# The long form of what `make test` does in short: see docs/reliability.md.
faults: .venv/.dev
	DARKROOM_FAULTS=5 $(BIN)/python -m pytest tests/faults

# What reads strangers' bytes, for as many examples as DARKROOM_FUZZ says; the queue and the API, for a twentieth as
# many sequences of its verbs, and calls of each operation.
fuzz: export DARKROOM_FUZZ ?= 20000
fuzz: .venv/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal tests/fuzz tests/unit/deployments/test_fuzz.py \
		tests/gateway/test_forms.py tests/gateway/test_properties.py tests/contract/test_queue_machine.py

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
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The documentation as a site, in out/docs: see mkdocs.yml.
docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: .venv/.bench
	$(BIN)/python -m benchmarks

# What the manifests in cluster/ take from serve_config.yaml and from the code.
manifests: .venv/.worker
	$(BIN)/darkroom manifests

# What a server needs, every file by its hash: `pip install --require-hashes -r requirements.lock`, after a torch of
# your choice. torch and what comes with it are not in it: its index decides CPU or CUDA. The images' are in cluster/;
# torch-cpu.lock is one file of PyTorch's own index, written by hand.
OF_TORCH := torch triton setuptools cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti \
	cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)
UNDER_TORCH := filelock fsspec jinja2 markupsafe mpmath networkx sympy typing-extensions

lock: .venv/.tools
	.venv/tools/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 \
		$(addprefix --no-emit-package ,$(OF_TORCH)) --extra worker --extra demo -c constraints.txt \
		--output-file requirements.lock pyproject.toml
	echo torch | .venv/tools/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 \
		--python-platform x86_64-manylinux_2_28 $(addprefix --no-emit-package ,$(UNDER_TORCH)) -c constraints.txt \
		--output-file cluster/torch-cuda.lock -

audit: .venv/.tools
	.venv/tools/bin/pip-audit --require-hashes --disable-pip --requirement requirements.lock

sbom: .venv/.tools .venv/.worker
	@mkdir -p out
	.venv/tools/bin/cyclonedx-py environment --output-file out/sbom.json .venv/bin/python

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

.venv/.tools: | .venv/.python
	$(PYTHON) -m venv .venv/tools
	.venv/tools/bin/pip install --quiet --disable-pip-version-check uv==0.13.9 pip-audit==2.10.1 cyclonedx-bom==7.5.0
	@touch $@

.venv/.bench: .venv/.dev
	$(PIP) --editable '.[worker,demo,dev,bench]'
	@touch $@
