# make demo   fresh virtual environment, install, predict bulk moduli of real crystals
# make test   fresh virtual environment, install, linters, types, docs and tests
# make check  the same checks in the environment that is active now
# make docs   the HTML pages, into docs/_build, likewise
PYTHON ?= python3
VENVS := .venvs
PIP_INSTALL = bin/python -m pip install --quiet --constraint constraints.txt

# torch goes first and alone, so that nothing else decides which build of it is taken.
define fresh_environment
	$(PYTHON) -m venv --clear $(VENVS)/$(1)
	$(VENVS)/$(1)/$(PIP_INSTALL) torch
	$(VENVS)/$(1)/$(PIP_INSTALL) $(2)
endef

.PHONY: demo test check docs

demo:
	$(call fresh_environment,demo,".[plot]")
	$(VENVS)/demo/bin/ssl-matfeat demo

test:
	$(call fresh_environment,test,--editable ".[dev]")
	@PATH="$(CURDIR)/$(VENVS)/test/bin:$$PATH" $(MAKE) --no-print-directory check

check:
	ruff check
	ruff format --check
	mypy
	@$(MAKE) --no-print-directory docs
	OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --dist loadscope

docs:
	python -m sphinx -W --keep-going -q -b html docs docs/_build/html
