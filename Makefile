# Every target does all of its own set-up. PYTHON picks the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OUT ?= runs/demo
RECIPE ?= online
GUIDANCE ?= 1.5
STAMP := $(VENV)/.installed

BENCH ?= runs/bench
FULL ?=
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*)

.PHONY: install test large lint demo bench bench-gpu inspect sanitize clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py requirements-dev.txt $(SOURCES)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	# torch by itself first: named exactly, it is found as a CPU build where one is at hand.
	$(RUN) -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements-dev.txt)"
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	# ANYFLOW_BUILD_EXT=auto: with the C++ kernels where there is a compiler. PATH: torch looks for ninja there.
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(STAMP)

lint: install
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

test: lint
	# One thread for each of the two workers: more would wait for each other.
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile -q --durations=15

# More than 2^31 elements: needs 16 GiB of free memory, so it is no part of the tests above.
large: install
	$(RUN) -m pytest -q -m large -rs --durations=0 tests/kernels/test_large.py

# The C++ kernels under the address and undefined behaviour sanitizers: every operator test, in a folder of their own.
sanitize: install
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" PYTHON=$(CURDIR)/$(RUN) csrc/sanitize.sh

# Some minutes on two cores; FULL=--full runs every size. Writes results.json, summary.md and bench.png.
bench: install
	$(RUN) -m benchmarks --out $(BENCH) $(FULL)

# Every size on a GPU. Installs nothing and needs no network: the virtual environment where there is one, else PYTHON.
bench-gpu:
	PYTHONPATH=.:python $(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) -m benchmarks --device cuda --full --out $(BENCH)

inspect: install
	$(RUN) benchmarks/inspect_kernels.py --out benchmarks/results

demo: install
	$(RUN) -m anyflow.demo --out $(OUT) --recipe $(RECIPE) --guidance $(GUIDANCE)

clean:
	rm -rf $(VENV) runs build anyflow_kernels/_C.* *.egg-info python/*.egg-info .ruff_cache .mypy_cache
