# The main targets are `make serve`, `make test` and `make check`. The first call installs the
# environment.
#
#   make serve ARGS="--port 9000 --kv-budget 256"
#   make test  PYTHON=python3.12 VENV=.venv-3.12 JOBS=4 ARGS="-k serve"

VENV ?= .venv
# The interpreter that creates the environment. Empty: the first one found of those listed below.
PYTHON ?=
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_DOCS := $(VENV)/.installed-docs
INSTALLED_NOTEBOOKS := $(VENV)/.installed-notebooks
CHECKPOINT := checkpoints/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: serve notebooks notebook-outputs test test-long check lint format types layers spelling option-table \
	server-reference docs package clean

serve: $(CHECKPOINT)
	$(BIN)/python -m fairkv_jax.serve $(ARGS)

# Opens the notebooks in JupyterLab.
notebooks: $(INSTALLED_NOTEBOOKS) $(CHECKPOINT)
	$(BIN)/jupyter lab --notebook-dir notebooks $(ARGS)

# Runs the notebooks and writes their .ipynb files; ARGS may name some of them.
notebook-outputs: $(INSTALLED_DEV) $(CHECKPOINT)
	$(BIN)/python -m doc_tools.notebooks $(ARGS)

test: $(INSTALLED_DEV) $(CHECKPOINT)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# Runs the long forms of suites that have a short form in `make test`. Variables of the environment
# shorten the longest: CHAOS_SECONDS (1200), OPENAPI_CASES (1000) for each operation, and
# SCHEDULER_EXAMPLES (1500).
test-long: $(INSTALLED_DEV) $(CHECKPOINT)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --long $(ARGS)

check: lint format types layers spelling

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .

format: $(INSTALLED_DEV)
	$(BIN)/ruff format --check .

# The tools of the documentation are checked with what they import.
types: $(INSTALLED_DEV) $(INSTALLED_DOCS)
	$(BIN)/pyright --pythonpath $(BIN)/python

layers: $(INSTALLED_DEV)
	$(BIN)/lint-imports

spelling: $(INSTALLED_DEV)
	$(BIN)/codespell

# Writes the table of options in docs/reference/options.md from their declarations. A test fails if
# it is out of date.
option-table: $(INSTALLED)
	$(BIN)/python -m fairkv_jax.serve.option_table

# Builds the documentation into site/. It fails if a link is broken or a table cannot be generated.
docs: $(INSTALLED_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "the documentation is in site/index.html"

# Writes the tables of docs/server.md. A test fails if they are out of date.
server-reference: $(INSTALLED)
	$(BIN)/python -m fairkv_jax.serve.reference docs/server.md

# Builds a wheel and a source distribution into dist/.
package: $(INSTALLED_DEV)
	$(BIN)/python -m build

clean:
	rm -rf $(VENV)

$(CHECKPOINT): | $(INSTALLED)
	$(BIN)/python -m fairkv_jax.checkpoint fetch

# The CUDA wheels are large, so they are installed only if there is an NVIDIA driver. CUDA 13 needs
# driver 580 or newer.
$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	@driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null \
		| head -n 1 | cut -d. -f1); \
	case "$$driver" in \
		''|*[!0-9]*) extra=; echo "no NVIDIA driver was found: JAX will use the CPU" ;; \
		*) if [ "$$driver" -ge 580 ]; then extra='[cuda13]'; else extra='[cuda12]'; fi; \
			echo "NVIDIA driver $$driver: installing the extra $$extra" ;; \
	esac; \
	echo "installing fairkv_jax$$extra into $(VENV)"; \
	$(BIN)/python -m pip install --quiet --editable ".$$extra"
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "installing the requirements of tests and checks into $(VENV)"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	@echo "installing the requirements of the documentation into $(VENV)"
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

$(INSTALLED_NOTEBOOKS): $(INSTALLED)
	@echo "installing JupyterLab and matplotlib into $(VENV)"
	$(BIN)/python -m pip install --quiet --editable '.[notebooks]'
	@touch $@

# Each interpreter is tried, because a name on PATH may be a version manager's shim that fails.
$(BIN)/python:
	@for python in $(or $(PYTHON),python3.12 python3.11 python3.13 python3); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "creating $(VENV) with $$("$$python" --version)"; \
			exec "$$python" -m venv "$(VENV)"; \
		fi; \
	done; \
	echo "$(or $(PYTHON),python3) is not Python 3.11 or newer: set another with make PYTHON=..." >&2; \
	exit 1
