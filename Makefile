# make train | test | bench | bench-smoke | gpu | gpu-check | lint: each makes .venv first if it is missing or out of date.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python

.PHONY: train test bench bench-smoke gpu gpu-check lint clean

train: $(VENV)/.installed
	$(PY) train/run.py --fused $(ARGS)

# a process a core, each with the tests of a file at a time; on the CPU, for a process that has used a GPU cannot fork
test: $(VENV)/.installed
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile $(ARGS)

# measures and writes bench/results/<date>-<device>.jsonl; under 15 minutes on two cores that do nothing else
bench: $(VENV)/.installed
	$(PY) -m pytest bench/ --benchmark-only --record -rs $(ARGS)

# every implementation once on tiny shapes; no record
bench-smoke: $(VENV)/.installed
	GOMP_SPINCOUNT=2000 $(PY) -m pytest bench/ --benchmark-only --benchmark-columns=median -rs -k smoke $(ARGS)

# on a GPU: all that only a GPU can tell, under eight minutes; with an interpreter that is there: make gpu PY=python3
gpu: $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.installed)
	$(PY) -m bench.gpu $(ARGS)

# every kernel in every configuration for four GPUs, offline: an hour or more on two cores; `make test` has a sample
gpu-check: $(VENV)/.installed
	GPU_CHECK=all $(PY) -m pytest --timeout 0 tests/test_gpu_*.py $(ARGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "set-up: creating $(VENV) and installing the pinned packages"
	@start=$$(date +%s) && \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])' && \
	{ test -x $(PY) || $(PYTHON) -m venv $(VENV); } && \
	$(PY) -m pip install --quiet --constraint constraints.txt torch triton && \
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench,hf,eval]' && \
	touch $@ && echo "set-up: $$(($$(date +%s) - start)) s"

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
