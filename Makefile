# Both commands do all their own set-up: virtual environment, pinned packages, base weights.
PYTHON ?= python3
BIN := .venv/bin
export DO_NOT_TRACK = 1
export DVC_NO_ANALYTICS = 1
export MLFLOW_DISABLE_TELEMETRY = true
export PREFECT_SERVER_ANALYTICS_ENABLED = false

.PHONY: demo demo-adapt test lint suite clean

# pip compiles on one core. compileall uses them all, and fails of templates that are no Python, which is no harm.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m compileall -qq --workers 0 .venv/lib || true
	touch $@

demo: .venv/installed
	$(BIN)/moa run

demo-adapt: .venv/installed
	$(BIN)/python -m flows.demo

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint suite

suite: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder

clean:
	rm -rf .venv .moa .mypy_cache .ruff_cache .pytest_cache build *.egg-info
