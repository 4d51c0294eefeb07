PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTHON312 ?= python3.12
BOTH := -n 2 --dist loadfile --no-loadscope-reorder  # two cores, each file's tests on one
MEGATRON := 0.16.1 0.17.1 0.18.2 0.19.2
BRIDGE := megatron-bridge==0.6.2 omegaconf hydra-core antlr4-python3-runtime==4.9.3 einops six datasets \
	dill multiprocess xxhash mistral-common sentencepiece tiktoken defusedxml  # what it imports of its requirements on a CPU
NVRX := --platform manylinux_2_39_$(shell uname -m) --only-binary :all: nvidia-resiliency-ext==0.7.0  # writers of checkpoints, \
	in Python: an older libc than it asks for will do

.PHONY: help demo test slow check coverage lowest megatron docs linkcheck bench clean

help:  ## print these lines
	@sed -n 's/^\([a-z]*\):.*##/\1:/p' Makefile

demo: $(VENV)/ready  ## train a tiny MoE, scan its checkpoints, draw demo/report.html
	$(BIN)/sinktrack demo --out demo

test: $(VENV)-test/ready  ## run the tests
	$(VENV)-test/bin/python -m pytest $(BOTH)

slow: $(VENV)-test/ready  ## run the tests that take minutes or packages of their own
	$(VENV)-test/bin/python -m pytest -m slow

check: $(VENV)-test/ready  ## what must hold before a change goes in: style, structure, types, tests
	$(VENV)-test/bin/ruff check .
	$(VENV)-test/bin/ruff format --check .
	$(VENV)-test/bin/codespell sinktrack callbacks tests scripts docs examples *.md
	$(VENV)-test/bin/lint-imports
	$(VENV)-test/bin/mypy -n 2
	$(MAKE) test

coverage: $(VENV)-test/ready  ## run the tests and list the branches that none of them takes
	$(VENV)-test/bin/python -m pytest $(BOTH) --cov --cov-report=term-missing

lowest:  ## run the tests with the oldest versions that pyproject.toml admits
	$(PYTHON) -m venv $(VENV)-lowest
	sed '1,/^dependencies = /d; /^docs = /,$$d' pyproject.toml | grep -o '"[a-z][a-z-]*>=[0-9.]*"' | tr -d '"' | sed 's/>=/==/' \
		> $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/pip install -q -c $(VENV)-lowest/constraints.txt torch==2.9.0
	$(VENV)-lowest/bin/pip install -q -c $(VENV)-lowest/constraints.txt -e '.[all,dev]'
	$(VENV)-lowest/bin/python -m pytest $(BOTH)

megatron: export OMP_NUM_THREADS := 1
megatron:  ## run Megatron's tests with each megatron-core that is known; from 0.17 on it wants Python 3.12
	$(PYTHON312) -m venv $(VENV)-megatron
	$(VENV)-megatron/bin/pip install -q -c constraints.txt torch==2.13.0
	$(VENV)-megatron/bin/pip install -q -c constraints.txt -e '.[all,dev]'
	$(VENV)-megatron/bin/pip install -q --no-deps $(NVRX) \
		--target "$$($(VENV)-megatron/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	for version in $(MEGATRON); do \
		$(VENV)-megatron/bin/pip install -q --no-deps megatron-core==$$version && \
		$(VENV)-megatron/bin/python -m pytest $(BOTH) -m "slow or not slow" tests/*/test_megatron*.py || exit 1; \
	done
	$(VENV)-megatron/bin/pip install -q --no-deps $(BRIDGE)
	$(VENV)-megatron/bin/python -m pytest -m slow -k bridge tests/callbacks/test_megatron_pretrain.py

docs: $(VENV)-test/ready  ## build docs/_build/html; fails on a broken link between pages
	$(VENV)-test/bin/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

linkcheck: $(VENV)-test/ready  ## try the external links of the pages; needs the internet
	$(VENV)-test/bin/python -m sphinx -q -b linkcheck docs docs/_build/linkcheck

bench: $(VENV)-test/ready  ## all benchmarks in a short form; their ratios go to docs/costs.md
	$(VENV)-test/bin/python scripts/bench.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)-test/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-test
	$(VENV)-test/bin/pip install -q -c constraints.txt torch==2.13.0
	$(VENV)-test/bin/pip install -q -c constraints.txt -e '.[all,docs,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-test $(VENV)-lowest $(VENV)-megatron demo build docs/_build
