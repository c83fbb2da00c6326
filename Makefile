# Everything installs into .venv; every target does its own set-up.
VENV := .venv
# The first that runs and is new enough: a name on the PATH alone proves nothing (version managers put up stubs).
PYTHON ?= $(shell for candidate in python3 python3.13 python3.12 python3.11; do \
	$$candidate -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$candidate && break; done)
BIN := $(VENV)/bin
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
THREADS := $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo moe test check installed lint types imports bench docs clean

demo: $(VENV)/.runtime ## generate the demo videos with each arm and write out/demo/report/index.html
	$(BIN)/adamac bakeoff --out out/demo --resume

moe: $(VENV)/.runtime ## train a small BigMac on this machine and sample from it
	$(BIN)/adamac moe train --out out/moe --resume
	$(BIN)/adamac moe generate out/moe --prompt "Return the" --samples 3

test: $(VENV)/.test ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(THREADS)

check: lint types imports test ## all that must pass before a commit lands

# The wheel, not the clone, out of sight of the clone: what users install has no .git, no tests and only packaged files.
installed: $(VENV)/.test ## build the wheel, install it apart, make a short bake-off with it and draw its report again
	rm -rf out/installed && mkdir -p out/installed
	$(BIN)/pip wheel -q --no-deps -w out/installed .
	$(BIN)/pip install -q --no-deps --target out/installed/site out/installed/*.whl
	cd out/installed && export PYTHONPATH=$(CURDIR)/out/installed/site && adamac="$(abspath $(BIN))/python -m adamac.cli" && \
		$(abspath $(BIN))/python -c 'import adamac, os; assert adamac.__file__.startswith(os.environ["PYTHONPATH"])' && \
		echo "a red ball rolls to the right" > prompt.txt && \
		$$adamac bakeoff --prompts prompt.txt --arms dense adacluster --steps 2 --height 64 --width 96 --frames 17 --min-tokens 0 --out run && \
		rm run/report/index.html && $$adamac report run && test -s run/report/index.html

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/ty check

imports: $(VENV)/.test
	$(BIN)/lint-imports

bench: $(VENV)/.test ## time attention on this machine and write rows
	$(BIN)/python benchmarks/attend_cpu.py

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) out site

# torch comes first: a bare `torch` would bring gigabytes of CUDA to a machine without a GPU.
$(VENV)/.torch:
	@test -n "$(PYTHON)" || { echo "adamac needs Python 3.11 or newer with venv; set PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(HAS_GPU),yes)
	$(BIN)/pip install -q 'torch>=2.11'
else
	$(BIN)/pip install -q 'torch==2.13.0+cpu' 2>/dev/null || \
		$(BIN)/pip install -q 'torch==2.13.0+cpu' --index-url https://download.pytorch.org/whl/cpu
endif
	touch $@

$(VENV)/.runtime: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -e '.[bakeoff,moe]'
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -e '.[test]'
	touch $@ $(VENV)/.runtime

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -e '.[docs]'
	touch $@
