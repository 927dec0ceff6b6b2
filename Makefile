# Two commands: `make demo` and `make test`. Each sets up a virtual environment of its own and all it needs.
# `make check` is the fast half of the tests, `make docs` builds the documentation site into build/site. PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILT_FROM := pyproject.toml CMakeLists.txt $(wildcard csrc/*)
CHECKED := slipway training tests tools examples benchmarks
CHECKED_CXX := $(wildcard csrc/*.h csrc/*.cc) tests/ops/sanitize.cc
# One BLAS and one torch thread per test process: xdist already uses every core.
WORKERS ?= 2

.PHONY: demo test check bench docs clean

demo: $(VENV)/core.stamp
	$(BIN)/slipway generate --prompt "$$(printf '%s\n' 'class Stack:' '    def __init__(self):' '        self.items = []' '' \
		'    def push(self, item):')" --max-tokens 64 --temperature 0.8 --top-p 0.95 --seed 14 --show-speed

test: $(VENV)/test.stamp check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup --durations 8

check: $(VENV)/test.stamp
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/clang-format --dry-run -Werror $(CHECKED_CXX)
	$(BIN)/python tools/sizes.py
	$(BIN)/python tools/plain.py
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m host -n $(WORKERS)

bench: $(VENV)/test.stamp
	$(BIN)/slipway bench engine --against transformers

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/core.stamp: $(BUILT_FROM)
	tools/venv.sh $(PYTHON) $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/test.stamp: $(BUILT_FROM)
	tools/venv.sh $(PYTHON) $(VENV)
	$(BIN)/pip install --quiet --editable .[test]
	touch $@ $(VENV)/core.stamp $(VENV)/docs.stamp

$(VENV)/docs.stamp: $(BUILT_FROM)
	tools/venv.sh $(PYTHON) $(VENV)
	$(BIN)/pip install --quiet --editable .[docs]
	touch $@ $(VENV)/core.stamp

clean:
	rm -rf $(VENV)
