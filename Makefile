# Everything runs from the checkout, in an environment that `make install` builds. `make help` lists the targets.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

# The accelerator found here. A TPU shows device files and a PCI device of Google's (vendor 1ae0).
ifndef DEVICE
DEVICE := $(shell \
	if nvidia-smi -L >/dev/null 2>&1 || test -e /proc/driver/nvidia/version; then echo cuda; \
	elif ls /dev/accel[0-9]* /dev/vfio/[0-9]* 2>/dev/null | grep -q . \
	  && grep -qsx 0x1ae0 /sys/bus/pci/devices/*/vendor; then echo tpu; \
	else echo cpu; fi)
endif

BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check --quiet
REQS := $(strip requirements.txt $(if $(filter cuda tpu,$(DEVICE)),requirements-$(DEVICE).txt))

.DEFAULT_GOAL := help
.PHONY: help install demo plan test test-reference check format lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s%s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Set on the command line: DEVICE=cpu|cuda|tpu (found here: $(DEVICE)), PYTHON=$(PYTHON), VENV=$(VENV), ARGS="..."'

install: $(VENV)/.installed ## Build the environment for this machine's CPU, GPU or TPU; quick when nothing changed

demo: install ## Train the smoke recipe into runs/smoke; more flags in ARGS
	$(BIN)/python launch/tpu.py --config recipes/smoke.py $(ARGS)

# In an environment of its own: with libtpu installed, JAX would look for TPUs in every run.
plan: ## Compile ViT-22B for 1,024 TPU v4 chips, here; another recipe and cluster in ARGS
	@$(MAKE) --no-print-directory install DEVICE=tpu VENV=.venv-plan
	.venv-plan/bin/python launch/plan.py $(or $(ARGS),--config recipes/vit22b.py --topology v4:8x8x16)

test: $(VENV)/.installed-test ## Run the tests; pytest options in ARGS
	$(BIN)/python -m pytest $(ARGS)

# In an environment of its own: nothing else here needs PyTorch, which may never be in the way of a run.
test-reference: ## Compare converted weights with PyTorch's libraries; pytest options in ARGS
	@$(MAKE) --no-print-directory .venv-reference/.installed-reference DEVICE=cpu VENV=.venv-reference
	.venv-reference/bin/python -m pytest $(or $(ARGS),tests/test_convert_reference.py)

check: $(VENV)/.installed-test ## Lint, formatting, types; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-test ## Sort imports and format the code
	$(BIN)/ruff check --fix --exit-zero --quiet
	$(BIN)/ruff format

# Keeps the versions already pinned, unless they no longer fit or ARGS=--upgrade asks for new ones.
lock: $(VENV)/.made ## Pin requirements*.in in requirements*.txt; ARGS=--upgrade for newer versions
	$(PIP) install uv
	for name in requirements requirements-test requirements-reference requirements-cuda requirements-tpu; do \
	  $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --annotation-style line \
	    --custom-compile-command 'make lock' --output-file $$name.txt $(ARGS) $$name.in || exit; \
	done

clean: ## Remove the environment and all caches; runs/ stays
	@for venv in $(VENV) .venv-plan .venv-reference; do test ! -e $$venv/pyvenv.cfg || rm -rf $$venv; done
	@rm -rf .pytest_cache .mypy_cache .ruff_cache
	@find . -path ./runs -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# .made says which device and Python the environment was built for: another one means a new environment.
# .installed and .installed-test are older than a requirement file that has changed.
BUILT_FOR := $(DEVICE) $(shell { $(PYTHON) -V; } 2>/dev/null)
ifneq ($(BUILT_FOR),$(shell cat $(VENV)/.made 2>/dev/null))
.PHONY: $(VENV)/.made
endif

$(VENV)/.made:
	@case '$(DEVICE)' in cpu|cuda|tpu) ;; *) echo 'DEVICE=$(DEVICE): choose cpu, cuda or tpu' >&2; exit 1;; esac
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "PYTHON=$(PYTHON) must be Python 3.11 or newer, not: $$($(PYTHON) -V 2>&1 | head -n 1)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo 'PYTHON=$(PYTHON) lacks venv or ensurepip; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo 'Building $(VENV) for: $(BUILT_FOR)'
	@base=$$($(PYTHON) -c 'import sys; print(sys._base_executable)') \
	  && "$$base" -m venv $$(test ! -e $@ || echo --clear) $(VENV)
	@echo '$(BUILT_FOR)' > $@

$(VENV)/.installed: $(VENV)/.made $(REQS)
	@echo 'Installing $(REQS): downloads 0.3 GB for cpu, 0.5 GB for tpu, 3.5 GB for cuda'
	$(PIP) install $(REQS:%=-r %)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements-test.txt
	$(PIP) install -r requirements-test.txt
	@touch $@

$(VENV)/.installed-reference: $(VENV)/.installed-test requirements-reference.txt
	@echo 'Installing requirements-reference.txt: downloads 0.3 GB, on Linux 3 GB'
	$(PIP) install -r requirements-reference.txt
	@touch $@
