# Needs make and Python 3.11, 3.12 or 3.13. Everything is installed in $(VENV) and nowhere else.
#   make demo                       make setup EXTRAS=cuda           make fast PYTHON=python3.12 VENV=.venv-3.12
VENV ?= .venv
EXTRAS ?=
PYTHON ?=
# Prints pip's errors only; PIP_QUIET=-v shows everything.
PIP_QUIET ?= -qq

# What the scripts choose for themselves, see jaxmed/build/launch.py; so that they need not start twice.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check $(PIP_QUIET)
TESTS ?=
# Processes that share the tests, a file each, and the notebooks; compiling, which takes most of the
# time, uses one core.
JOBS ?= 2

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup venv test-tools demo test lint fast slow notebook wheel pins clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "Settings: EXTRAS=cuda|tpu|dicom-seg|export|notebooks|sweeps|test|torch (several with commas)  PYTHON=...  VENV=.venv"

setup: venv ## Make .venv and install jaxmed in it; EXTRAS=cuda for NVIDIA GPUs, EXTRAS=tpu for TPUs
	@VENV="$(VENV)" PIP="$(PIP)" sh .ci/install "$(EXTRAS)"

test-tools: venv
	@VENV="$(VENV)" PIP="$(PIP)" sh .ci/install "test,$(EXTRAS)"

venv:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh .ci/venv

demo: setup ## Train all three tasks on built-in phantoms and show the results
	$(PY) experiments/demo.py

test: lint fast slow ## Run every check: lint, then the fast tests, then the slow ones

lint: test-tools ## Check style, formatting, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

fast: test-tools ## Run the fast tests; TESTS=tests/models chooses some
	$(PY) -m pytest -q -n $(JOBS) --dist loadfile --durations=5 -m "not slow" $(TESTS)

slow: test-tools ## Run the tests that train a model or start processes
	$(PY) -m pytest -q -n $(JOBS) --dist loadfile --durations=20 -m slow $(TESTS)

notebook: test-tools ## Run every notebook from top to bottom
	@printf '%s\n' notebooks/*.ipynb | xargs -P $(JOBS) -I{} sh -c \
	  '$(BIN)/jupyter-execute --timeout=1200 "$$0" && echo "passed: $$0" || { echo "failed: $$0"; exit 1; }' {}

wheel: test-tools ## Build the wheel and try it in a clean environment, away from this folder
	@VENV="$(VENV)" PIP="$(PIP)" sh .ci/wheel

pins: venv ## Pin the newest versions that pyproject.toml allows, for the Python of VENV
	$(PY) .ci/pins.py

clean: ## Remove build products and caches (not .venv, not runs)
	rm -rf build dist jaxmed.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find jaxmed tests configs experiments -name __pycache__ -type d -prune -exec rm -rf {} +
