# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first (about 2 minutes, 7 GB: torch and
# faiss-gpu bring CUDA libraries, which are not needed on a machine without a GPU but come along).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := test
# Images of containers set it. Nothing is compiled beforehand, so each of hundreds of processes would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo study-tables test faults lint check-types compiled docs coverage clean

# Nothing is compiled beforehand: of 20,000 files hardly a fifth is ever imported, and Python compiles those then.
$(VENV)/.installed: setup.cfg pyproject.toml
	@echo "== installing into $(VENV) with $$($(PYTHON) --version): about 2 minutes, 7 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(VENV)/.installed
	@echo "== demo: embed the digits, select a quarter of each batch, train with several seeds (about 3 minutes on 2 cores)"
	$(BIN)/python benchmarks/demo.py

# Before the tests, two at a time: what needs one core each.
test: $(VENV)/.installed
	$(MAKE) --no-print-directory --jobs 2 --output-sync check-types compiled lint docs
	@echo "== tests: about 15 minutes on 2 cores"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not faults and not ray"
	@echo "== tests on a Ray cluster of two nodes, which take both cores: a minute; left out, and counted, without ray"
	$(BIN)/python -m pytest tests/cluster -m "ray and not faults"

# The tables of docs/study.md, from the lines of benchmarks/study/results/. The runs: benchmarks/study/README.md.
study-tables: $(VENV)/.installed
	$(BIN)/python -m benchmarks.study.tables

# Every kill point, every byte, thousands of orders of events, every barrier of a CUDA kernel. GSTDS_FAULT_SEED=N draws
# the same points again.
faults: $(VENV)/.installed
	@echo "== faults: about three quarters of an hour on 2 cores"
	$(BIN)/python -m pytest tests/faults tests/cluster tests/cuda tests/embedding/test_part.py tests/e2e/test_scale_document.py tests/e2e/test_container.py tests/e2e/test_rubbish.py tests/e2e/test_unwritable_places.py -m "faults or not faults"

lint: $(VENV)/.installed
	@echo "== ruff and import-linter: seconds"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

check-types: $(VENV)/.installed
	@echo "== mypy: about a minute"
	$(BIN)/mypy

# What numba compiles is compiled once, not by both test processes at the same time.
compiled: $(VENV)/.installed
	@echo "== numba: half a minute, if it has not been done"
	OMP_NUM_THREADS=1 $(BIN)/python tests/shared/compile_all.py

# Pages with the Python interface in site/; a broken link is an error. Not with --quiet: it drops the warnings that --strict
# would count, and a broken link passes.
docs: $(VENV)/.installed
	@echo "== documentation: seconds"
	$(BIN)/python -m mkdocs build --strict

coverage: $(VENV)/.installed
	$(BIN)/python -m pytest --cov --cov-report=term

clean:
	rm -rf $(VENV) .demo site
