# Short verbs; CI, pre-commit and people call the same ones.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: install demo test slow lint types check matrix bench soak fuzz browser site base clean

install: $(STAMP)  ## the project and all that tests need, into .venv

# torch first, alone and pinned: a later resolution would fetch gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## a real fine-tuning on the CPU, in a few minutes
	$(BIN)/python demo/run.py

# One thread a process: two workers with two threads each spend more time waiting for each other than computing.
test: $(STAMP)  ## the suite, but for `slow`
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

slow: $(STAMP)  ## whole programs from start to end (examples/*.sh, the README's path), the dearest tests of several processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

lint: $(STAMP)  ## ruff, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)  ## mypy --strict over vlft and the built-in strategies
	$(BIN)/mypy

check: lint types test slow  ## everything that CI asks

base: $(STAMP)  ## draw and train the demo's base model again
	$(BIN)/python demo/make_base.py

matrix: $(STAMP)  ## every layout against one process, about ten minutes; writes the table in docs/distributed.md
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/matrix.py

bench: $(STAMP)  ## what the performance pages are made with, the part that runs on a CPU
	$(BIN)/python bench/index.py
	$(BIN)/python bench/data.py --startup
	$(BIN)/python bench/host.py

soak: $(STAMP)  ## 120 kills, then two hosts (network namespaces: needs root) whose link is cut; half an hour
	VLFT_SOAK=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults/test_kills.py -s
	$(BIN)/python tests/faults/soak_two_hosts.py

fuzz: $(STAMP)  ## 10,000 mutated records and pictures
	VLFT_FUZZ=10000 $(BIN)/python -m pytest tests/faults/test_fuzz.py -s

browser: $(STAMP) build/axe/package/axe.min.js  ## the report in Chromium, with axe-core (as root: apt-get installs it)
	command -v chromium || { apt-get update -q && apt-get install -q -y --no-install-recommends chromium fonts-dejavu-core; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/report/test_browser.py -rs

build/axe/package/axe.min.js:
	mkdir -p build/axe
	cd build/axe && tar xzf "$$(npm pack --silent axe-core@4.14.1)"

site: $(STAMP)  ## docs/ as a site, into build/site; a broken link fails
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build

clean:
	rm -rf $(VENV) runs build dist
