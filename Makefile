# Everything runs in .venv, which `make setup` creates (and the other targets, if it is not there).
# PYTHON=python3.12 chooses the interpreter. A torch that is already in .venv is kept.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: help setup quickstart test test-slow faults check bench clean

help:
	@echo "make setup       create .venv with the locked versions"
	@echo "make quickstart  data, tokenizer, a small PoE, evaluation, export, generation: under 10 minutes on 2 cores"
	@echo "make test        the tests, some minutes on 2 cores"
	@echo "make test-slow   the long ones, the whole fault suite among them"
	@echo "make faults      the whole fault suite alone: a line for each fault, about three quarters of an hour"
	@echo "make check       ruff, types, the layers of the house, every experiment file"
	@echo "make bench       speed and memory of a training step"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

quickstart: $(READY)
	bash runs/quickstart.sh

test: $(READY)
	$(RUN) -m pytest -m "not slow" -n 2 --dist loadscope --no-loadscope-reorder

test-slow: $(READY)
	$(RUN) -m pytest -m slow

faults: $(READY)
	$(RUN) -m tests.faults

check: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m pytest tests/test_house.py
	$(RUN) -m scripts.check_config configs/*.yaml

bench: $(READY)
	$(RUN) -m scripts.bench step

clean:
	rm -rf $(VENV) out data build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
