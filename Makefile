# Two commands do everything on a fresh clone: `make quickstart` trains on the embedded corpus, `make test` runs the tests.
# PYTHON: the interpreter of the environment (3.11 or newer). TORCH_INDEX: where torch comes from when not from PyPI, such
# as https://download.pytorch.org/whl/cpu for a build without CUDA.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/pip --disable-pip-version-check install -q -c constraints.txt
TORCH := $(BIN)/pip --disable-pip-version-check install -q -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
CPU := CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu
CONFIG ?= configs/quickstart.yaml
RANKS ?= 2

# Whatever else is given is a key of the configuration: make quickstart resume=auto train.epochs=3. Training refuses what
# is no such key; make alone would take it for a variable, and begin a run without it.
# make hands them over with \ before blanks, tabs and \, and with $ twice; the shell gets each of them in single quotes.
OWN := PYTHON TORCH_INDEX CONFIG RANKS WORKERS PYTEST FAST VENV BIN INSTALLED PIP TORCH CPU SHELL
NONE :=
TAB := $(NONE)	$(NONE)
GIVEN = $(subst \$(TAB),<tab>,$(subst \ ,<space>,$(subst \\,<backslash>,$(subst $$$$,$$,$(MAKEOVERRIDES)))))
PLAIN = $(subst <backslash>,\,$(subst <space>, ,$(subst <tab>,$(TAB),$(1))))
KEYS = $(foreach key,$(filter-out $(OWN:%=%=%) $(OWN:%=%:=%),$(GIVEN)),'$(subst ','\'',$(call PLAIN,$(key)))')

.PHONY: quickstart test test-fast check format docs clean

quickstart: $(INSTALLED)
	$(CPU) $(BIN)/deepspeed -q --num_gpus $(RANKS) launch/train.py --config $(CONFIG) $(KEYS)

# Three processes, also for two cores, as the longest files wait for commands. A file's tests stay in one of them, and
# files are taken in the order of tests/conftest.py: the longest first.
WORKERS ?= 3
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST)

# One process, nothing that starts ranks or commands, no long files: 90 s of CPU at most.
FAST := not ranks and not deepspeed and not launch and not slow and not cuda
test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "$(FAST)" $(PYTEST)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The site, into site/; a warning is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

$(VENV)/.docs: $(INSTALLED)
	$(PIP) --no-build-isolation -e '.[docs]'
	touch $@

# torch first and by itself: whatever build it is then stays. DeepSpeed looks at the installed torch while it is built.
$(INSTALLED): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "PYTHON: expected 3.11 or newer, got $$($(PYTHON) --version); run make PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(TORCH)
	$(PIP) setuptools wheel ninja
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
