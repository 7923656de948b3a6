# make demo    a prompt to a video, and a video through the tokenizer and back; with MODEL=ar-shapes or landiff-shapes a short and a long video
# make test    lint, types and all tests but the long ones
# make long    the tests that `make test` leaves out, of which shorter ones hold most
# make quick   the tests of what a change breaks first, about five minutes on two cores
# make gate    whether clips of the packaged models still obey their captions, two minutes on one core
# make test-app  the page of `dicode app` in headless Chromium, where there is one
# make types   what pyright finds in the library, which is nothing
# make lowest  demo and quick with exactly the lower bounds of pyproject.toml; wants the oldest Python, 3.11
# make dist    sdist and wheel in dist/, checked as PyPI will; docs/releasing.md
# make docs    the site of the documentation, in build/docs; a warning is an error
# make notebooks   notebooks/ as .ipynb, in build/notebooks
# make audit   published holes of the packages in .venv; asks an advisory service
# make clean   remove what these made
#
# They make their own environment in .venv, lowest in .venv-lowest. Nothing but Python >= 3.11 and a package
# index is needed.
#   PROMPT="a small blue cross moves up on a gray background"   VIDEO=path/to/a/video   SEED=0   STEPS=50
#   PYTHON=python3.12                   the interpreter that .venv is made from
#   PYTEST_ARGS="-k unet"               what pytest gets besides the defaults
#   BROWSER=/usr/bin/chromium           what test-app starts; SCREENSHOTS=docs/images keeps pictures of the packaged model
#   TORCH=torch==2.13.0                 what pip installs to test the reading of torch files; none by default
#   REPOSITORY=https://github.com/...   where this lies, for links of site, notebooks and README; none by default
#   TAG=v1.2.3                          of a release, for `make dist`

PROMPT ?= a red circle moves right on a black background
VIDEO ?=
MODEL ?= shapes
SEED ?= 0
STEPS ?= 50
OUT ?= outputs/demo
VENV ?= .venv
PYTEST_ARGS ?=
TORCH ?=
REPOSITORY ?=
TAG ?=
BROWSER ?= $(shell for b in chromium chromium-browser google-chrome; do command -v $$b && break; done)
SCREENSHOTS ?=
comma := ,

# Videos, samplers, pipelines, training steps and runs, checkpoints, sharding, the commands, the package.
QUICK := -m "not slow" tests/cli tests/data tests/diffusion tests/e2e tests/media tests/storage tests/train tests/training \
  $(addprefix tests/,pipelines/test_dicode.py stages/test_export.py runtime/test_sharding.py) \
  $(addprefix tests/test_,config.py package.py readme.py scripts.py)

# Every requirement at its lower bound; `make lowest` hands them to pip.
PINS ?=
LOWEST := import re, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(*(re.sub("[>~]=", "==", r) for r in p["dependencies"] + p["optional-dependencies"]["test"]))

# The first interpreter that is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

BIN := $(VENV)/bin

# Passed through the environment and unexpanded, so that no quote or dollar sign in them is ever code.
export DEMO_PROMPT := $(value PROMPT)
export DEMO_VIDEO := $(value VIDEO)
export DEMO_OUT := $(value OUT)
unexport PROMPT VIDEO OUT
export REPOSITORY

# Compiled programs are kept, so that a second run starts sooner.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.5
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo demo-shapes demo-ar-shapes demo-landiff-shapes test test-app browse long types quick gate lowest dist docs notebooks audit clean

help:
	@sed -n '1,23s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

# $(call install,what,stamp): an editable install, repeated only when pyproject.toml changes.
define install
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: no Python >= 3.11 at '$(PYTHON)'; name one with PYTHON=..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@echo "installing $(1) into $(VENV): about 1 GB, a minute or more the first time"
	@$(BIN)/python -m pip install --quiet --editable "$(1)" $(PINS)
	@touch $@
endef

$(VENV)/.installed-core: pyproject.toml
	$(call install,.)

$(VENV)/.installed-test: pyproject.toml
	$(call install,.[test])
	@touch $(VENV)/.installed-core

$(VENV)/.installed-release: pyproject.toml
	$(call install,.[release])
	@touch $(VENV)/.installed-core

$(VENV)/.installed-docs: pyproject.toml
	$(call install,.[docs])
	@touch $(VENV)/.installed-core

$(VENV)/.installed-app: pyproject.toml
	$(call install,.[test$(comma)app])
	@$(BIN)/python -m pip install --quiet "playwright>=1.49"
	@touch $(VENV)/.installed-core $(VENV)/.installed-test

demo: demo-$(MODEL)

# AR-Diffusion: a video of one window, and one that is eight times as long.
demo-ar-shapes: $(VENV)/.installed-core
	@mkdir -p "$$DEMO_OUT"
	@for frames in 16 128; do \
	  echo "$$frames frames: $$DEMO_PROMPT"; \
	  $(BIN)/dicode generate --model $(MODEL) --seed $(SEED) --steps $(STEPS) --num-frames $$frames \
	    --out "$$DEMO_OUT/frames$$frames.mp4" --sheet "$$DEMO_OUT/frames$$frames.png" -- "$$DEMO_PROMPT" || exit; \
	done

# LanDiff: a video of one window, and one of five.
demo-landiff-shapes: $(VENV)/.installed-core
	@mkdir -p "$$DEMO_OUT"
	@for clips in 1 5; do \
	  echo "$$clips window(s): $$DEMO_PROMPT"; \
	  $(BIN)/dicode generate --model $(MODEL) --seed $(SEED) --num-clips $$clips \
	    --out "$$DEMO_OUT/windows$$clips.mp4" --sheet "$$DEMO_OUT/windows$$clips.png" -- "$$DEMO_PROMPT" || exit; \
	done

demo-shapes: $(VENV)/.installed-core
	@if [ -n "$$DEMO_VIDEO" ] && [ ! -f "$$DEMO_VIDEO" ]; then \
	  echo "error: no video file at $$DEMO_VIDEO" >&2; exit 1; fi
	@mkdir -p "$$DEMO_OUT"
	@echo "1/3  generate: $$DEMO_PROMPT"
	@$(BIN)/dicode generate --seed $(SEED) --steps $(STEPS) \
	  --out "$$DEMO_OUT/generated.mp4" --sheet "$$DEMO_OUT/generated.png" -- "$$DEMO_PROMPT"
	@if [ -z "$$DEMO_VIDEO" ]; then \
	  $(BIN)/python scripts/draw_video.py --seed $(SEED) --out "$$DEMO_OUT/input.mp4"; fi
	@input="$${DEMO_VIDEO:-$$DEMO_OUT/input.mp4}"; \
	  echo "2/3  encode: $$input"; \
	  $(BIN)/dicode encode --out "$$DEMO_OUT/tokens.safetensors" -- "$$input" && \
	  echo "3/3  decode" && \
	  $(BIN)/dicode decode "$$DEMO_OUT/tokens.safetensors" --seed $(SEED) --steps $(STEPS) \
	    --out "$$DEMO_OUT/decoded.mp4" && \
	  $(BIN)/python scripts/compare_videos.py --out "$$DEMO_OUT/comparison.png" \
	    -- "$$input" "$$DEMO_OUT/decoded.mp4" && \
	  printf '%s\n' "" "from the prompt:  $$DEMO_OUT/generated.mp4" \
	    "                  $$DEMO_OUT/generated.png (contact sheet)" \
	    "from the video:   $$DEMO_OUT/tokens.safetensors (deep tokens)" \
	    "                  $$DEMO_OUT/decoded.mp4" \
	    "                  $$DEMO_OUT/comparison.png (above $$input, below its decoding)"

# At most four workers: each needs about 1 GB, later 3. A file stays on one of them, where what it compiles and makes is.
test: $(VENV)/.installed-test
	@if [ -n "$(TORCH)" ]; then $(BIN)/python -m pip install --quiet "$(TORCH)"; fi
	@$(BIN)/ruff format --check --quiet . || { \
	  $(BIN)/ruff format --check . ; echo "mend with: $(BIN)/ruff format ." >&2; exit 1; }
	@$(BIN)/ruff check .
	@$(MAKE) --no-print-directory types
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

# The browser of the distribution; playwright drives it and brings none.
test-app:
	@if [ -n "$(BROWSER)" ]; then $(MAKE) --no-print-directory browse BROWSER="$(BROWSER)"; else \
	  echo "no chromium, chromium-browser or google-chrome was found: the page was not looked at"; fi

browse: $(VENV)/.installed-app
	@APP_BROWSER="$(BROWSER)" APP_SCREENSHOTS="$(SCREENSHOTS)" \
	  $(BIN)/python -m pytest tests/app tests/cli/test_app.py $(PYTEST_ARGS)

types: $(VENV)/.installed-test
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

# The tests that `make test` leaves out.
long: $(VENV)/.installed-test
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --long -m long $(PYTEST_ARGS)

quick: $(VENV)/.installed-test
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(QUICK) $(PYTEST_ARGS)

# Floors are a little below the lower ends of the intervals that docs/evaluation.md has.
gate: $(VENV)/.installed-core
	@rm -rf outputs/gate
	@$(BIN)/dicode evaluate shapes --suite shapes --num 32 --out outputs/gate/shapes --at-least \
	  color=0.95 shape=0.95 motion=0.95 background=0.95 size=0.9 all=0.9 "all, and in every frame=0.84"
	@$(BIN)/dicode evaluate ar-shapes --suite shapes --num 32 --lag 0 --out outputs/gate/ar-shapes --at-least \
	  color=0.95 shape=0.92 motion=0.79 background=0.95 size=0.88 all=0.74 "all, and in every frame=0.42" \
	  --at-most "color wobble=2.5"
	@$(BIN)/dicode evaluate landiff-shapes --suite shapes --num 32 --out outputs/gate/landiff-shapes --at-least \
	  color=0.95 shape=0.78 motion=0.85 background=0.95 size=0.78 all=0.68

lowest:
	@pins=$$("$(PYTHON)" -c '$(LOWEST)') && \
	  $(MAKE) --no-print-directory demo quick VENV=.venv-lowest PINS="$$pins"

# Built from what git tracks, which the sdist must hold whole: its tests run. The wheel is built from the sdist.
dist: $(VENV)/.installed-release
	@rm -rf dist
	@$(BIN)/python scripts/release_tree.py lay outputs/release --repository "$(REPOSITORY)" --tag "$(TAG)"
	@$(BIN)/pyproject-build --outdir dist outputs/release >outputs/release.log 2>&1 || { tail -n 40 outputs/release.log; exit 1; }
	@$(BIN)/python scripts/release_tree.py check outputs/release dist
	@$(BIN)/twine check --strict dist/*

docs: $(VENV)/.installed-docs
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env -d build/doctrees -c docs . build/docs
	@echo "the site is in build/docs/index.html"

notebooks: $(VENV)/.installed-docs
	@$(BIN)/python docs/notebook_pages.py --out build/notebooks

# pip-audit has an environment of its own, so that what it needs is not audited with ours.
audit: $(VENV)/.installed-core
	@test -x .venv-audit/bin/pip-audit || { "$(PYTHON)" -m venv --clear .venv-audit && \
	  .venv-audit/bin/python -m pip install --quiet pip-audit; }
	@PIPAPI_PYTHON_LOCATION="$(abspath $(BIN)/python)" .venv-audit/bin/pip-audit --skip-editable

clean:
	rm -rf $(VENV) .venv-newest .venv-lowest .venv-audit outputs/demo outputs/gate outputs/release* build dist *.egg-info .jax_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
