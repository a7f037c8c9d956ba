# Two commands set everything up: `make demo` runs the main job, `make test` passes the tests. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find kernels -name '*.cpp' -o -name '*.h' -o -name 'CMakeLists.txt')

.PHONY: demo test lint bench fuzz clean

demo: $(VENV)/installed-demo
	$(BIN)/python examples/demo.py

test: $(VENV)/installed-dev lint
	$(BIN)/python -m tests.browser
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/installed-dev
	$(BIN)/python -m bench.kernels --quick
	$(BIN)/python -m bench.compile
	$(BIN)/python -m bench.serving

# Seconds for each target, and calls of each route and kind; a finding ends the run and is written to a file here.
FUZZ_SECONDS ?= 600
FUZZ_EXAMPLES ?= 2000
fuzz: $(VENV)/installed-dev
	for target in safetensors artifact tokenizer config quantisation_config template onnx_model; do \
		$(BIN)/python -m tests.fuzz $$target --seconds $(FUZZ_SECONDS) || exit 1; \
	done
	XLLM_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -q tests/service/test_openapi.py tests/service/test_fuzzed.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/installed-demo: pyproject.toml $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[compile]'
	touch $@

$(VENV)/installed-dev: pyproject.toml $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/installed-demo

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache
