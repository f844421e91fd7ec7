# `make demo` and `make test` first create a virtual environment, if there is none.

VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python

.PHONY: demo test lint clean

demo: $(VENV)/installed ## train a teacher, distil a student, print the results; no data download
	$(RUN) train.py experiment=demo

test: $(VENV)/installed ## run the tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed ## check formatting, lint and types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
