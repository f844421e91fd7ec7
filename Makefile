# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Both set up a virtual environment of their own first, once.

VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python

.PHONY: demo test lint clean

demo: $(VENV)/installed ## teacher trained, student distilled, results printed: no download of data
	$(RUN) train.py experiment=demo

test: $(VENV)/installed ## the tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed ## format, lint and types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
