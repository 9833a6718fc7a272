# Needs Python 3.11 or newer, pip and make; every target sets up .venv by itself, once.
PYTHON ?= python3
RANKS ?= 2
BLOCKS ?= 2000
# The least percentage of the fuzzer's supported blocks that is proven.
PROVEN ?= 98
# How many processes random blocks and seeded bugs get.
JOBS ?= 2
BIN := .venv/bin
READY := .venv/.installed

.PHONY: demo test families long mutants fuzz check clean

demo: $(READY)
	$(BIN)/torchrun --nproc-per-node $(RANKS) examples/finetune.py

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not matrix and not long"

long: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m long

mutants: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation --jobs $(JOBS)

families: fuzz
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m matrix

fuzz: $(READY)
	$(BIN)/moe-compile fuzz --blocks $(BLOCKS) --jobs $(JOBS) --share $(PROVEN)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that pip takes the build this machine is configured for.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@
