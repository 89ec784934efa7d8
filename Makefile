# One command first: make demo. Needs python3 (3.11 or newer) with venv, and a package index that pip reaches.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo test test-long test-gpu runtimes lint format clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,llama-cpp]'
	touch $@

.venv: $(STAMP)

# The whole pipeline on a real model, two processes. OMP_NUM_THREADS only keeps torchrun quiet: the job sets its own.
demo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 launch/qat.py +scenario=gateway parallel.pipeline=2

test: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu and not long"

test-long: $(STAMP)
	$(BIN)/python -m pytest -m "long and not gpu"

# Other programs that read what we ship and whose pins conflict with ours: an environment each. TensorRT Edge-LLM's export
# runs on a CPU, without the CUDA bindings that it names as a dependency (tools/edge_llm.py).
EDGE_LLM := .venv-edgellm
runtimes: $(EDGE_LLM)/installed

$(EDGE_LLM)/installed: tools/edge_llm_requirements.txt
	test -x $(EDGE_LLM)/bin/python || $(PYTHON) -m venv $(EDGE_LLM)
	$(EDGE_LLM)/bin/python -m pip install --quiet --disable-pip-version-check -r tools/edge_llm_requirements.txt
	$(EDGE_LLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps tensorrt-edgellm==0.11.0
	touch $@

# On a machine with a CUDA device, whose own Python has torch: no virtual environment is made there.
test-gpu:
	$(PYTHON) -m pytest -m gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-edgellm .mypy_cache .pytest_cache .ruff_cache build *.egg-info
