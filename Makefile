# `make demo` and `make test` first create a virtual environment, if there is none.
# `make demo TORCH=cpu` creates it with PyTorch's CPU build, without several GB of CUDA libraries.

VENV ?= .venv
PYTHON ?= python3
TORCH ?= default
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --constraint constraints.txt

.PHONY: demo test lint docs notebook clean

demo: $(VENV)/installed ## train a teacher, distil a student, print the results; no data download
	$(RUN) train.py experiment=demo

test: $(VENV)/installed ## run the tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed ## check formatting, lint and types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

docs: $(VENV)/installed-docs ## build the documents as a site, in site/
	$(RUN) -m mkdocs build --strict

notebook: $(VENV)/installed-docs ## execute docs/notebook.ipynb and store its outputs
	$(RUN) -m nbconvert --to notebook --execute --inplace docs/notebook.ipynb

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),cpu)
	$(PIP) --extra-index-url https://download.pytorch.org/whl/cpu torch torchvision
endif
	$(PIP) --editable '.[dev]'
	$(RUN) -m compileall -q src # pip compiles only packages that it copies
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) site
