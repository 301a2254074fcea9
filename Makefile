# Everything runs in .venv (test-newest: .venv-newest), made on first use. `make` alone lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INPUTS := setup.py pyproject.toml constraints.txt
# Two stages, so that the demo need not wait for the test oracles. constraints.txt is not optional: an unpinned
# torch may bring gigabytes. setuptools is installed first because the editable install must not need a network.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo photo test test-newest lint format bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /: /' | awk -F': ' '{ printf "make %-11s %s\n", $$1, $$2 }'

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/installed: $(INPUTS) | $(BIN)/python
	@echo "installing bokehflux into .venv"
	@$(INSTALL) setuptools wheel
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

.venv/installed-dev: $(INPUTS) | $(BIN)/python
	@echo "installing bokehflux and its test tools into .venv"
	@$(INSTALL) setuptools wheel
	@$(INSTALL) --no-build-isolation --editable '.[test,oracle,dev]'
	@touch .venv/installed $@

demo: .venv/installed ## bokeh sweep with the bundled model on this machine's CPU, into outputs/demo
	$(BIN)/bokehflux generate --device cpu --prompt "$(DEMO_PROMPT)" \
	  --bokeh-targets 0 4 8 12 18 28 --bokeh-pivot 15 --output outputs/demo
	@echo "look at the last file: all levels on one sheet"

# The photograph comes with scikit-image, of which only its files are needed; without it nano's world stands in.
photo: .venv/installed ## levels, apertures and planes of focus of one photograph, into outputs/photo
	-@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps scikit-image
	$(BIN)/python scripts/photo.py

# Two processes share the files of tests, in order: by number of tests the longest (test_cross_compile: five) would come
# last. Where there is a GPU its memory is for one.
SHARED := -n $(if $(shell command -v nvidia-smi),0,2) --dist loadfile --no-loadscope-reorder

test: .venv/installed-dev ## all tests that this machine can run
	$(BIN)/python -m pytest -q $(SHARED) $(PYTEST_ARGS)

# What a person gets who installs today, the oracles of tests/parity included. On Linux PyPI's torch is a CUDA build of
# several GB, and the newest CPU build comes from PyTorch's own index: add it with PIP_EXTRA_INDEX_URL, or name
# another build, as in NEWEST_TORCH=torch==2.13.0.
NEWEST_TORCH ?= torch
NEWEST := transformers diffusers accelerate tokenizers huggingface_hub pillow numpy
ifeq ($(shell uname -s),Linux)
NEWEST += triton
endif

test-newest: ## all tests with the newest packages that the index has
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade setuptools wheel
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --no-build-isolation \
	  --editable '.[test]' '$(NEWEST_TORCH)' $(NEWEST)
	.venv-newest/bin/python -m pytest -q $(SHARED) $(PYTEST_ARGS)

# mypy cannot follow the package mapping of setup.py, so it reads a copy that is laid out as installed.
lint: .venv/installed-dev ## ruff, its formatter, and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/types && mkdir -p build/types && cp -R bokehflux build/types/ && cp -R kernels weights build/types/bokehflux/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p bokehflux

format: .venv/installed-dev ## let ruff mend and format every file
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed ## seconds that nano needs for a picture here; BENCH="step --arms ours" etc. runs others
	$(BIN)/python -m benchmarks.run $(or $(BENCH),nano_seconds)

clean: ## remove build products, not the environment
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

DEMO_PROMPT ?= a red ball on a wooden table, city lights at night
