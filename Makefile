# make .venv   set up        make demo   the main job on embedded data
# make test    all tests     make lint   ruff and mypy
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# detectron2 has no release on PyPI for current Pythons; this wheel's Python sources are upstream's
# a59f0563, its compiled part is not used (torchvision has RoIAlign and NMS). See README, "Set-up".
D2 := sal-detectron2==0.7.2
D2_SHA256 := 491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561
PYTEST_OPTIONS ?=
# A detectron2 that $(PYTHON) can import is kept, and its torch with it: their folder joins the path.
SITE = import sysconfig; print(sysconfig.get_path("purelib"))
D2_HOME := $(shell cd / && $(PYTHON) -c 'import detectron2; $(SITE)' 2>/dev/null)

.PHONY: demo test lint format benchmark clean
.DELETE_ON_ERROR:

$(VENV): $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else \
		f"error: Python {v[0]}.{v[1]} is too old, 3.11 or newer is needed; make PYTHON=python3.12")'
	@echo "setting up $(VENV): a few minutes, torch is large"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(D2_HOME),echo "import site; site.addsitedir('$(D2_HOME)')" > "$$($(BIN)/python -c '$(SITE)')/kept.pth")
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(D2_HOME),,-c constraints.txt) ".[dev,fast,slurm]"
	@rm -rf build transfer_suite.egg-info
	$(BIN)/python -c 'import detectron2' 2>/dev/null || $(MAKE) --no-print-directory detectron2
	$(BIN)/python -c 'import detectron2, torch, torchvision; print("ready: torch", torch.__version__, \
		"torchvision", torchvision.__version__, "detectron2", detectron2.__version__)'
	@touch $@

.PHONY: detectron2
detectron2:
	printf '%s --hash=sha256:%s\n' '$(D2)' '$(D2_SHA256)' > $(VENV)/detectron2.txt
	$(BIN)/python -m pip install --quiet --no-deps --only-binary=:all: --require-hashes \
		--python-version 3.10 --implementation cp --abi none --platform any \
		--target "$$($(BIN)/python -c '$(SITE)')" \
		-r $(VENV)/detectron2.txt

demo: $(VENV)/.done
	$(BIN)/python tools/benchmark.py --config suites/quickstart.yaml

test: $(VENV)/.done
	$(BIN)/python -m pytest -m 'not slow' $(PYTEST_OPTIONS)

lint: $(VENV)/.done
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(VENV)/.done
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

benchmark: $(VENV)/.done
	$(BIN)/python benchmarks/run.py --all

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build
