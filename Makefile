# Two commands: `make demo` and `make test`. Both set up everything they need, and skip what is already done.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# OpenMP threads that spin for long while they wait slow a busy machine down several times
export GOMP_SPINCOUNT ?= 10000

.PHONY: demo test notebooks pytest lab
demo: .venv/ready
	tmlab demo

test: notebooks pytest

notebooks: .venv/ready
	nbdev_test --skip_folder_re '^[_.]|^experiments$$|^explorers$$' --n_workers 2 --do_print

pytest: .venv/ready
	python -m pytest -q --durations=15

lab: .venv/ready
	tmlab lab

.venv/ready: settings.ini setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "tmlab needs Python 3.11, 3.12 or 3.13; none is on the PATH (set PYTHON=/path/to/python3)"; exit 1; }
	@echo "Setting up .venv with $(PYTHON) (once; a few minutes)"
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --progress-bar off --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
