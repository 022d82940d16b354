# Both commands do all their own set-up: virtual environment, pinned packages, base weights.
PYTHON ?= python3
BIN := .venv/bin
export DO_NOT_TRACK = 1
export DVC_NO_ANALYTICS = 1
export MLFLOW_DISABLE_TELEMETRY = true
export PREFECT_SERVER_ANALYTICS_ENABLED = false

.PHONY: demo demo-adapt test test-fast lint suite suite-fast test-random test-slow-model test-busy test-ways bench \
	bench-quick figures parameters clean

# pip compiles on one core. compileall uses them all, and fails of templates that are no Python, which is no harm.
# The distribution was once called `moa`: pip would keep the old one beside it, as another package.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip uninstall --quiet --disable-pip-version-check --yes moa 2> /dev/null
	rm -rf moa.egg-info
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m compileall -qq --workers 0 .venv/lib || true
	touch $@

demo: .venv/installed
	$(BIN)/moa run

demo-adapt: .venv/installed
	$(BIN)/python examples/demo_adapt.py

# What the benchmarks claim, and how old their stored results are. Measures nothing.
bench: .venv/installed
	$(BIN)/python benchmarks/listing.py

# What benchmarks/training.py is compared with.
.venv/bench: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[bench]"
	touch $@

# Measures the ratios again, about 15 minutes on two cores, and stores nothing. `make bench-quick ARGS="--only decoding"`
bench-quick: .venv/installed .venv/bench
	$(BIN)/python benchmarks/quick.py $(ARGS)

# Fills the figures of the documents from benchmarks/results; a test holds them fresh.
figures: .venv/installed
	$(BIN)/python benchmarks/render.py

# The documents that are made from the models of moa/core/config.py; a test holds them fresh.
parameters: .venv/installed
	$(BIN)/python -m moa.core.config_reference docs

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint Dockerfile
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs --quiet build --strict

test: lint suite

PYTEST = HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadscope \
	--no-loadscope-reorder $(ARGS)

suite: .venv/installed
	$(PYTEST)

# For a change of a few lines: lint, and the unit tests that take seconds.
test-fast: .venv/installed
	$(MAKE) --jobs=2 lint suite-fast

suite-fast: .venv/installed
	$(PYTEST) -m "not slow" tests/unit

# The suite does not depend on the machine's speed or on the order of the tests. ARGS goes to pytest in each of these.
test-ways: .venv/installed
	$(MAKE) suite
	$(MAKE) test-slow-model
	$(MAKE) test-busy
	$(MAKE) test-random

# Each pass of the toy model takes ten times as long, in every process.
test-slow-model: .venv/installed
	MOA_TEST_SLOW_MODEL=10 $(PYTEST)

# Two processes beside the tests do nothing but compute.
test-busy: .venv/installed
	yes > /dev/null & first=$$!; yes > /dev/null & second=$$!; \
	trap 'kill $$first $$second' EXIT; trap 'exit 130' INT TERM; $(PYTEST)

# pytest prints the seed: `make test-random ARGS=--random-order-seed=SEED` repeats an order.
test-random: .venv/installed
	$(PYTEST) --random-order

clean:
	rm -rf .venv .moa .mypy_cache .ruff_cache .pytest_cache build *.egg-info
