# PYTHON=python3.12  makes .venv with another Python        VENV=path  uses an existing environment, whose torch is kept
# TORCH=path.whl     installs torch into .venv from a file  ARGS=...   is passed on to the command
PYTHON ?= python3
VENV ?=
TORCH ?=
ARGS ?=

# Warnings are errors only where constraints.txt decides on every version.
ifeq ($(VENV),)
env := $(CURDIR)/.venv
driver := $(PYTHON)
pytest := -m pytest -W error
else
env := $(shell cd "$(VENV)" 2>/dev/null && pwd || echo "$(VENV)")
driver := $(env)/bin/python
pytest := -m pytest
endif
python := "$(env)/bin/python"

define setup
@command -v "$(driver)" >/dev/null || { echo "There is no $(driver). Needed is Python 3.11 or newer (package python3), named by PYTHON= or in VENV=." >&2; exit 2; }
@"$(driver)" tools/setup_env.py $(if $(VENV),--venv "$(env)") $(if $(TORCH),--torch "$(TORCH)") --for
endef

.PHONY: help demo test bench docs lint clean
.NOTPARALLEL:

help:
	@echo "make demo   train a small encoder, compare it with plain PyTorch, draw out/gunpoint.png"
	@echo "make test   all tests"
	@echo "make bench  all benchmarks"
	@echo "make docs   the documentation, built without network"
	@echo "make lint   ruff, mypy and clang-format"
	@echo "make clean  remove what was built; .venv stays"
	@echo
	@sed -n 's/^# \(.*=\)/\1/p' Makefile | head -n 2

demo:
	$(setup) demo
	@mkdir -p out
	"$(env)/bin/pykernels" reproduce usrl --dataset GunPoint --k 5 --compare --picture out/gunpoint.png $(ARGS)

# From tests/ and with -P, so that the installed package is tested and not the source tree.
test:
	$(setup) test
	cd tests && $(python) -P $(pytest) $(ARGS)

bench:
	$(setup) bench
	$(python) bench/run.py $(ARGS)
	$(python) -P -m pytest -q bench/test_micro.py

# Warnings are errors here in any environment: a broken reference is one.
docs:
	$(setup) docs
	$(python) -P -m sphinx -W --keep-going -q docs docs/_build
	@echo "open $(CURDIR)/docs/_build/index.html"

lint:
	$(setup) lint
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	"$(env)/bin/clang-format" --dry-run --Werror $$(find kernels csrc -name '*.[ch]pp')

clean:
	rm -rf build dist docs/_build docs/generated .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
