# Everything that a fresh clone needs: Python >= 3.11 and make. The first target to run sets up .venv.
#
#   make demo       train a small network, compile it, show what its exits save (out/demo/)
#   make check-demo hold its program to a budget (.ci/budget.toml), twice: a baseline, then against it
#   make test       lint, types, and every test that is not slow
#   make test-all   the slow tests too
#   make bench      the CIFAR-10 benchmark: make bench DATA=folder WEIGHTS=folder
#   make bench-cascade  that of cascades, likewise
#   make bench-finetune  that of fine-tuned exits, likewise: an hour and a quarter on two cores, most of it training
#   make bench-int8  that of int8, likewise: an hour and a half, and more to train where nothing is trained yet
#   make zoo        which networks of torchvision, timm and transformers compile (docs/zoo.md): two hours
#   make bench-budgets  how often `exitcompiler check` is right: two hours on an idle machine
#   make gpu-check  on a machine with a GPU: tests and figures, nothing is installed (docs/gpu.md)
#   make format     rewrite the code as `make lint` wants it
#   make clean      remove what was built; `make distclean` also removes .venv

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCE_LIST := $(VENV)/.source-list
REFRESHED := $(VENV)/.refreshed
EDITABLE := --config-settings editable_mode=strict
SOURCES := $(sort $(wildcard exitcompiler/*.py exitcompiler/py.typed exitcompiler/templates/* exitcompiler/budgets/*.py exitcompiler/finetuning/*.py passes/*.py runtime/*.py runtime/*.cu))

# Tests of a file stay together, since what they have in common is made once; one thread each.
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder

DATA ?=
WEIGHTS ?=
BENCH_ARGS ?=
ZOO_ARGS ?=
BUDGETS_ARGS ?=
OUT ?= out/gpu
GPU_ARGS ?=
# The one that has torch: what PYTHON says, else that of .venv where there is one.
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(firstword $(wildcard $(BIN)/python) $(PYTHON)),$(PYTHON))

.PHONY: help setup demo check-demo test test-all lint types format bench bench-cascade bench-finetune bench-int8 bench-budgets zoo gpu-check clean distclean force

help:
	@sed -n '3,15s/^#  *//p' Makefile

setup: $(REFRESHED)

# Once, and again when the dependencies change. torch goes first and alone: whatever else asks for it
# then finds the pinned one.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "exitcompiler needs Python >= 3.11: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q setuptools wheel -c constraints.txt
	$(BIN)/python -m pip install -q torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install -q -e '.[cpu,report,dev]' -c constraints.txt $(EDITABLE)
	touch $@

# A strict editable install links each file, so it has to be renewed when one is added or removed.
$(SOURCE_LIST): force | $(INSTALLED)
	@printf '%s\n' $(SOURCES) | cmp -s - $@ || printf '%s\n' $(SOURCES) > $@

$(REFRESHED): $(INSTALLED) $(SOURCE_LIST)
	$(BIN)/python -m pip install -q -e . --no-deps --no-build-isolation $(EDITABLE)
	@touch $@

demo: setup
	$(BIN)/exitcompiler demo

# What is inconclusive on a machine that is too busy (exit code 2, and a report) is no failure; a broken limit is.
check-demo: demo
	rm -f out/demo/baseline.json
	for option in --update-baseline --max-seconds=90; do \
	  rm -f out/demo/budget.xml; \
	  $(BIN)/exitcompiler check out/demo/digits.exit --budget .ci/budget.toml --data out/demo/held_out.npz \
	    --junit out/demo/budget.xml $$option || { test $$? -eq 2 && test -s out/demo/budget.xml; } || exit 1; \
	done

test: lint types
	$(BIN)/pytest -q $(WORKERS) -m "not slow and not gpu"

test-all: lint types
	$(BIN)/pytest -q $(WORKERS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Not from the root: there the folders passes/ and runtime/ hide the installed packages.
types: setup
	cd docs && ../$(BIN)/mypy --config-file ../pyproject.toml -p exitcompiler

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	@test -n "$(DATA)" -a -n "$(WEIGHTS)" || { echo "usage: make bench DATA=folder WEIGHTS=folder"; exit 2; }
	$(BIN)/python benchmarks/cifar10.py --data "$(DATA)" --weights "$(WEIGHTS)" $(BENCH_ARGS)

bench-cascade: setup
	@test -n "$(DATA)" -a -n "$(WEIGHTS)" || { echo "usage: make bench-cascade DATA=folder WEIGHTS=folder"; exit 2; }
	$(BIN)/python benchmarks/cifar10_cascade.py --data "$(DATA)" --weights "$(WEIGHTS)" $(BENCH_ARGS)

bench-finetune: setup
	@test -n "$(DATA)" -a -n "$(WEIGHTS)" || { echo "usage: make bench-finetune DATA=folder WEIGHTS=folder"; exit 2; }
	$(BIN)/python benchmarks/cifar10_finetune.py --data "$(DATA)" --weights "$(WEIGHTS)" $(BENCH_ARGS)

bench-int8: setup
	@test -n "$(DATA)" -a -n "$(WEIGHTS)" || { echo "usage: make bench-int8 DATA=folder WEIGHTS=folder"; exit 2; }
	$(BIN)/python benchmarks/cifar10_int8.py --data "$(DATA)" --weights "$(WEIGHTS)" $(BENCH_ARGS)

bench-budgets: setup
	$(BIN)/python benchmarks/budgets.py $(BUDGETS_ARGS)

zoo: setup
	$(BIN)/python benchmarks/zoo.py $(ZOO_ARGS)

gpu-check:
	$(GPU_PYTHON) benchmarks/gpu.py --out "$(OUT)" $(GPU_ARGS)

clean:
	rm -rf build dist out *.egg-info .mypy_cache docs/.mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f $(SOURCE_LIST) $(REFRESHED)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
