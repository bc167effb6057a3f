# make quickstart   set up, then train, export and sample a small Monet on real text
# make test         set up, then all tests
# make test-fast    set up, then the tests for every day, in two minutes: none that needs long, several processes,
#                  Slurm or a GPU; both in two processes side by side, or in as many as WORKERS=4 says
# make install      set up alone: .venv/ with the monet-* commands
# make lint         ruff and mypy
# make clean        remove what quickstart made
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/bindings/* csrc/cpu/* csrc/cuda/*)
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt

# Processes that run tests side by side. Many tests start several processes of their own: not one per core.
WORKERS ?= 2
FAST := not slow and not distributed and not slurm and not gpu

.PHONY: quickstart test test-fast install lint clean

install: $(STAMP)
	@echo "installed: $(CURDIR)/$(BIN)/monet-train, monet-data, monet-export, monet-generate"

# torch first: setup.py builds csrc/ against the torch that is there
$(STAMP): $(SOURCES)
	@echo "set-up: downloading and installing into $(CURDIR)/$(VENV); about two minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy "setuptools>=77" wheel
	$(PIP) --no-build-isolation -e ".[dev]"
	@$(BIN)/python -c "from monet_train.kernels import AUTO; print(AUTO.describe('cpu'))"
	@touch $@

quickstart: $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart.sh quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS)

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "$(FAST)"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf quickstart build *.egg-info
