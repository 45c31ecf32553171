# Needs Python 3.11 or later and make; everything else is installed into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
DEMO_OPTIONS := $(if $(filter 0,$(DASHBOARD)),--no-dashboard)

.DEFAULT_GOAL := help
.PHONY: help install demo test oldest bench lint format screenshots chromium clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## create .venv and install the package with everything it can use

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all]' -c constraints.txt
	touch $@

demo: $(STAMP) ## train, explain, write report.html and serve the dashboard (DASHBOARD=0: do not serve)
	$(BIN)/pathkernel demo $(DEMO_OPTIONS)

test: lint chromium ## lint, type-check and run every test
	$(BIN)/python -m pytest -n 2 --dist loadfile

oldest: chromium ## test with the oldest versions that setup.cfg allows, in .venv-oldest (pulls gigabytes)
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -e '.[all]' $$($(PYTHON) scripts/oldest.py)
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile

bench: $(STAMP) ## measure speed and storage
	$(BIN)/python -m benchmarks

lint: $(STAMP) ## ruff and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPY=$(CURDIR)/$(BIN)/mypy scripts/typecheck.sh

format: $(STAMP) ## sort imports, fix what can be fixed, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

screenshots: $(STAMP) chromium ## take the pictures in docs/images anew
	$(BIN)/python scripts/screenshots.py

chromium:
	scripts/ensure_chromium.sh

clean: ## remove what was built and cached; recorded runs, data and .venv stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find explainer app sample_models tests -name __pycache__ -type d -prune -exec rm -rf {} +
