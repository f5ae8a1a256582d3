# Two commands: `make demo` and `make test`. Both make .venv with PYTHON and install what they need, once.
PYTHON ?= python3
VENV ?= .venv
SLOW ?=
FIXTURES ?= ../shared/fixtures

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check install -c constraints.txt

# CI runs the slow tests, and the reference's numbers a second time on fixtures it has beside the checkout.
RUN_SLOW := $(or $(filter-out 0,$(SLOW)),$(filter true 1,$(CI)))
MARKS := $(if $(RUN_SLOW),,-m "not slow")
# Tests that start several processes run one after the other; the others share the cores.
SEVERAL := tests/agreement tests/gpu tests/ray
ONE_EACH := tests/test_architecture.py tests/unit

.PHONY: demo test clean

demo: $(VENV)/installed
	$(PY) jobs/demo.py

test: $(VENV)/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest $(MARKS) -n logical --maxprocesses 4 --dist worksteal $(ONE_EACH)
	$(PY) -m pytest $(MARKS) $(SEVERAL)
ifneq ($(filter true 1,$(CI)),)
ifneq ($(wildcard $(FIXTURES)),)
	HRM_RAY_FIXTURES=$(abspath $(FIXTURES)) $(PY) -m pytest tests/unit/test_reference_fixtures.py
else
	@echo "WARNING: $(FIXTURES) is not there: the reference was checked on tests/fixtures only"
endif
endif

# A stamp is newer than what it was made from, or the install is run again.
$(VENV)/made:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/made pyproject.toml constraints.txt
	$(PIP) -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/made pyproject.toml constraints.txt
	$(PIP) -e ".[dev]"
	@touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
