# make demo          simulate slides, train, predict a held-out slide, write a report
# make test          the tests; EXT=1 also builds torch-scatter and torch-cluster and tests against them
# make trust         what a user may rely on: bad inputs, kills, attacks (5 minutes)
# make docs          the documentation, its tutorials executed; docs/_build/html/index.html
# make lint          ruff, layers of imports, types, words that were given up
# make clean         remove what the targets above made, except the environment
#
# PYTHON, TORCH and VENV can be overridden, e.g. make test TORCH='torch==2.11.0' VENV=.venv-2.11

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
EXT ?=
PYTEST_ARGS ?=
# On small tensors, more threads wait for each other longer than they work.
TEST_THREADS ?= 1

# A short training for a look around; DEMO_ARGS go to `ipar-sparse train` after these.
DEMO_DIR ?= demo
DEMO_SPOTS ?= 1000
DEMO_STEPS = --set encoder.steps=300 --set train.gate_steps=150 --set train.minisets=120 \
  --set train.val_minisets=16 --set train.epochs=6 --set train.ramp_epochs=2
DEMO_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ipar-ready
EXT_READY := $(VENV)/.ipar-ext-ready
DOCS_READY := $(VENV)/.ipar-docs-ready
# Whatever torch was installed first is what every later install has to live with.
PINNED := $(VENV)/torch-constraint.txt

.PHONY: env ext docs demo test trust lint clean

env: $(READY)

$(READY): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q "$(TORCH)"
	@$(BIN)/python -c "from importlib.metadata import version as v; print('torch==' + v('torch'))" > $(PINNED)
	$(PIP) install -q -c $(PINNED) -e ".[cli,faiss,test]"
	@touch $@

ext: $(EXT_READY)

# The wheels depend on the torch they were compiled against, which pip's wheel cache does not
# know: one cache per torch version.
$(EXT_READY): $(READY)
	$(PIP) install -q -c $(PINNED) setuptools wheel
	$(PIP) install -q -c $(PINNED) --no-build-isolation \
	  --cache-dir "$$($(PIP) cache dir)/ipar_sparse-$$(cat $(PINNED))" \
	  torch-scatter==2.1.2 torch-cluster==1.6.3
	$(BIN)/python -c "import torch_scatter, torch_cluster"
	@touch $@

docs: $(DOCS_READY)
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

$(DOCS_READY): $(READY)
	$(PIP) install -q -c $(PINNED) -e ".[docs]"
	@touch $@

test: $(READY) $(if $(EXT),$(EXT_READY))
	$(if $(EXT),IPAR_SPARSE_REQUIRE_EXT=1) OMP_NUM_THREADS=$(TEST_THREADS) \
	  $(BIN)/python -m pytest -m "not slow and not trust" $(PYTEST_ARGS)

trust: $(READY)
	$(BIN)/python -m pytest -m trust $(PYTEST_ARGS)

# The fourth slide is seen by no stage of the training.
demo: $(READY)
	rm -rf $(DEMO_DIR)
	$(BIN)/ipar-sparse simulate $(DEMO_DIR)/slides --tissue cortex --slides 4 --spots $(DEMO_SPOTS)
	$(BIN)/ipar-sparse train $(DEMO_DIR)/slides/cortex1.h5ad $(DEMO_DIR)/slides/cortex2.h5ad \
	  --val $(DEMO_DIR)/slides/cortex3.h5ad --out $(DEMO_DIR)/run $(DEMO_STEPS) $(DEMO_ARGS)
	$(BIN)/ipar-sparse predict $(DEMO_DIR)/run $(DEMO_DIR)/slides/cortex4.h5ad \
	  --out $(DEMO_DIR)/cortex4_placed.h5ad
	$(BIN)/ipar-sparse evaluate $(DEMO_DIR)/run $(DEMO_DIR)/slides/cortex4.h5ad \
	  --out $(DEMO_DIR)/report
	@echo
	@echo "The report: $(abspath $(DEMO_DIR))/report/report.html"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy
	$(BIN)/python tests/lint_words.py

clean:
	rm -rf $(DEMO_DIR) docs/_build build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache \
	  .pytest_cache .ruff_cache
