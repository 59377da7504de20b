# make demo        trains a detector from scratch on the demonstration data and draws what it sees
# make test        lint, unit tests and short trainings through the toolboxes, within 10 minutes
# make test-unit   unit tests alone, within 3 minutes
# make test-slow   the rest: documentation, exports, resumed trainings, hostile files, within 25 minutes
# make fuzz        ten times as many hostile files and state dicts as in test-slow
# make docs        builds the documentation, from docs/_build/index.html on
#
# Each makes a virtual environment with the pinned stack first and adds what it needs.
# STACK=onedl     the second stack
# OPS=compiled    compiles mmcv's operators, instead of taking those of torchvision
# ARGS=...        arguments of pytest
# PYTHON, VENV    the interpreter, and the folder of the environment

STACK ?= openmmlab
OPS ?= torchvision
ifndef PYTHON
PYTHON := $(firstword $(shell command -v python3.11 || command -v python3 || command -v python))
endif
VENV ?= .venv$(if $(filter openmmlab,$(STACK)),,-$(STACK))$(if $(filter torchvision,$(OPS)),,-$(OPS))
MIM_DET := $(if $(filter onedl,$(STACK)),onedl-mmdetection,mmdet)
DEMO_CONFIG := configs/mpvit/mask-rcnn_mpvit-tiny_fpn_mini-coco.py
DEMO_DIR := work_dirs/demo
SETUP = @test -n "$(PYTHON)" || { echo "no Python found: install Python 3.11, or make PYTHON=/path/to/python3.11"; exit 1; }; \
	$(PYTHON) tools/setup_env.py --stack $(STACK) --ops $(OPS) --venv $(VENV) --for
# As many processes as cores that may be used; each takes up to 2 GB.
PYTEST = python -m pytest -n $(shell $(PYTHON) -c 'import os; print(min(8, len(os.sched_getaffinity(0))))') --dist worksteal

export PATH := $(abspath $(VENV))/bin:$(PATH)
export MPLBACKEND := Agg
# Threads that wait for each other sleep after a short while instead of spinning. Beside a busy process spinning
# makes a training ten times slower; on a quiet machine, sleeping at once makes it 40% slower.
ifndef OMP_WAIT_POLICY
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 1000
endif
# Operators that were compiled without nvcc cannot run on a GPU.
ifeq ($(OPS)$(shell command -v nvcc 2> /dev/null),compiled)
export CUDA_VISIBLE_DEVICES :=
endif

.NOTPARALLEL:
.PHONY: env demo test test-unit test-slow fuzz lint docs clean

env:
	$(SETUP) env

demo:
	$(SETUP) demo
	python tools/dataset_converters/make_mini_coco.py data/mini
	mim train $(MIM_DET) $(DEMO_CONFIG) --gpus 0 --work-dir $(DEMO_DIR)
	python tools/visualization/predictions.py $(DEMO_CONFIG) `cat $(DEMO_DIR)/last_checkpoint` \
		--out $(DEMO_DIR)/predictions.png
	python tools/analysis_tools/curves.py $(DEMO_DIR) --out $(DEMO_DIR)/curves.png

# The second stack runs the tests that depend on the toolboxes, not those of the package alone.
test: lint
	$(PYTEST) -m "not slow$(if $(filter onedl,$(STACK)), and stack)" $(ARGS)

test-unit:
	$(SETUP) test
	$(PYTEST) tests/unit -m "not slow" $(ARGS)

test-slow:
	$(SETUP) test-slow
	$(PYTEST) -m slow $(ARGS)

fuzz:
	$(SETUP) test
	MMVITZOO_FUZZ=10000 $(PYTEST) tests/fuzz $(ARGS)

lint:
	$(SETUP) test
	ruff check .
	ruff format --check .

docs:
	$(SETUP) docs
	sphinx-build -W --keep-going docs docs/_build

clean:
	rm -rf $(VENV) $(VENV)-setup.log build docs/_build *.egg-info $(DEMO_DIR) data/mini
