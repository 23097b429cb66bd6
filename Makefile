# Needs make and Python 3.11 or newer; every target sets up the rest by itself, in .venv, the first time it is asked.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
LOG := $(VENV)/install.log
# Leave it empty to take the first Python on the PATH that is new enough.
PYTHON ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
MATRIX_ARGS ?=

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: docs dist matrix clients torchrl-tests help demo train test lint typecheck bench figures surface clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(STAMP)  ## chunks from a live simulator, then two minutes of learning from it, with a plot
	@$(BIN)/python examples/agents/datasets/online_dataset_demo.py
	@echo
	@$(BIN)/python examples/training/pick_and_place.py --seconds 120

train: $(STAMP)  ## a policy learns pick and place from a live simulator until it can; pictures in outputs/pick_and_place
	@$(BIN)/python examples/training/pick_and_place.py

# On three processes, also on two cores: much of the suite waits for processes that it starts. A file's tests stay
# together, and files with slow tests come first (tests/conftest.py).
test: lint typecheck  ## lint, check types and run the tests; PYTEST_ARGS="-k ledger" runs some
	@$(BIN)/python -m compileall -q embodichain_rl  # once, where PYTHONDONTWRITEBYTECODE would have each process do it
	@$(BIN)/python -m pytest -n 3 --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff: rules and formatting; import-linter: who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

typecheck: $(STAMP)  ## mypy
	@$(BIN)/mypy

bench: $(STAMP)  ## measure it beside its peers, about ten minutes; BENCH_ARGS=--quick in one; results in outputs/benchmarks
	@$(BIN)/python benchmarks/suite.py $(BENCH_ARGS)

clients: $(STAMP)  ## TorchRL's own scripts on both buffers, side by side; TORCHRL=PATH is a checkout of pytorch/rl
	@test -n "$(TORCHRL)" || { echo "Give a checkout of github.com/pytorch/rl: make clients TORCHRL=PATH" >&2; exit 1; }
	@$(BIN)/python examples/clients/compare.py $(TORCHRL) $(CLIENTS_ARGS)

torchrl-tests: $(STAMP)  ## TorchRL's own tests of replay buffers with the classes of this library; TORCHRL=PATH as above
	@test -n "$(TORCHRL)" || { echo "Give a checkout of github.com/pytorch/rl: make torchrl-tests TORCHRL=PATH" >&2; exit 1; }
	@$(BIN)/python examples/clients/torchrl_tests.py $(TORCHRL)

docs: $(STAMP)  ## build the documentation in site/; a broken link or reference is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo site/index.html

# Each of the two is installed in an environment of its own, without anything else.
dist: $(STAMP)  ## build the distributions in dist/, install each in a bare environment, and run a smoke test there
	@rm -rf dist build/bare
	@$(BIN)/python -m build
	@set -e; for distribution in dist/*.whl dist/*.tar.gz; do \
		$(BIN)/python -m venv --clear build/bare; \
		build/bare/bin/python -m pip install --quiet -c constraints.txt "$$distribution"; \
		(cd build/bare && bin/python -I ../../tests/support/smoke.py && bin/embodichain-rl demo --seconds 1 > demo.log); \
	done

matrix: $(STAMP)  ## run a part of the tests with several versions of Python and packages; takes an hour; MATRIX_ARGS=--help
	@$(BIN)/python tests/support/matrix.py $(MATRIX_ARGS)

surface: $(STAMP)  ## write the public names and signatures to docs/public_surface.txt
	@$(BIN)/python tests/support/public_surface.py

figures:  ## draw the figures in docs/figures from their .dot files; needs Graphviz
	@command -v dot >/dev/null || { \
		echo "make figures needs Graphviz: no program 'dot' on the PATH." >&2; \
		echo "Install it (apt-get install graphviz, brew install graphviz), or see https://graphviz.org/download." >&2; \
		exit 1; \
	}
	@set -e; for source in docs/figures/*.dot; do \
		dot -Tsvg "$$source" -o "$${source%.dot}.svg"; \
		echo "$${source%.dot}.svg"; \
	done

clean:  ## remove the environment, the caches and what was built
	@rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@rm -f embodichain_rl/replay/kernels/kernels.compiled.so
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: its version is then settled before any other package asks for a range of it. LeRobot last and
# without what it asks for, which is an older torch. Of torchvision it imports what is written in Python. The version in
# constraints.txt is the newest on PyPI that can be imported without its compiled operators: those need the torch that
# they were compiled for, with CUDA.
# The installation compiles the kernels if there is a C compiler; with NATIVE=1, it fails without one.
$(STAMP): pyproject.toml constraints.txt hatch_build.py embodichain_rl/replay/kernels/kernels.c
	@set -e; \
	if ! $(BIN)/python -c '$(NEW_ENOUGH)' 2>/dev/null; then \
		found=; \
		for python in $(or $(PYTHON),python3 python3.11 python3.12 python3.13 python); do \
			if $$python -c '$(NEW_ENOUGH)' 2>/dev/null; then found=$$python; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "Needs Python 3.11 or newer; $(or $(PYTHON),the python on the PATH) is not, or is missing." >&2; \
			echo "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
			exit 1; \
		fi; \
		$$found -m venv --clear $(VENV); \
	fi; \
	echo "Installing into $(VENV); this takes some minutes the first time (log: $(LOG))"; \
	{ $(BIN)/python -m pip install -c constraints.txt torch && \
	  $(BIN)/python -m pip install -c constraints.txt -e '.[mujoco,robotics,examples,frameworks,lerobot,minari,images,ray,watch,prometheus,rerun,docs,dev]' && \
	  $(BIN)/python -m pip install -c constraints.txt --no-deps lerobot torchvision; \
	} > $(LOG) 2>&1 || { cat $(LOG) >&2; exit 1; }; \
	touch $(STAMP)
