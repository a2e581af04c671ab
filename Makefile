# What a newcomer types: `make serve`, `make test`, `make check`. The second time takes seconds.
#
#   make serve ARGS="--port 9000 --kv-budget 256"
#   make test  PYTHON=python3.12 VENV=.venv-3.12 JOBS=4 ARGS="-k serve"

VENV ?= .venv
# The interpreter that makes the environment; empty takes the newest that is known to work.
PYTHON ?=
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
CHECKPOINT := checkpoints/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: serve test test-long check lint format types layers option-table clean

serve: $(CHECKPOINT)
	$(BIN)/python -m fairkv_jax.serve $(ARGS)

test: $(INSTALLED_DEV) $(CHECKPOINT)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# The suites that take longer than a change should wait for; each has a short form in `make test`.
test-long: $(INSTALLED_DEV) $(CHECKPOINT)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --long $(ARGS)

check: lint format types layers

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .

format: $(INSTALLED_DEV)
	$(BIN)/ruff format --check .

types: $(INSTALLED_DEV)
	$(BIN)/pyright --pythonpath $(BIN)/python

layers: $(INSTALLED_DEV)
	$(BIN)/lint-imports

# README's table of options, from their declarations; a test fails while it is stale.
option-table: $(INSTALLED)
	$(BIN)/python -m fairkv_jax.serve.option_table README.md

clean:
	rm -rf $(VENV)

$(CHECKPOINT): | $(INSTALLED)
	$(BIN)/python -m fairkv_jax.checkpoint fetch

# The CUDA wheels are large: they are installed only where a driver answers. CUDA 13 needs the
# driver 580 or newer.
$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	@driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null \
		| head -n 1 | cut -d. -f1); \
	case "$$driver" in \
		''|*[!0-9]*) extra=; echo "no GPU answers: JAX will use the CPU" ;; \
		*) if [ "$$driver" -ge 580 ]; then extra='[cuda13]'; else extra='[cuda12]'; fi; \
			echo "NVIDIA driver $$driver: installing the extra $$extra" ;; \
	esac; \
	echo "installing fairkv_jax$$extra into $(VENV)"; \
	$(BIN)/python -m pip install --quiet --editable ".$$extra"
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "installing what the tests and checks need into $(VENV)"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# A name on PATH may be a shim of a version manager that runs nothing, so each one is tried.
$(BIN)/python:
	@for python in $(or $(PYTHON),python3.12 python3.11 python3.13 python3); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "making $(VENV) with $$("$$python" --version)"; \
			exec "$$python" -m venv "$(VENV)"; \
		fi; \
	done; \
	echo "$(or $(PYTHON),python3) is not Python 3.11 or newer: name one by make PYTHON=..." >&2; \
	exit 1
