# make demo        train a detector from scratch on the demonstration data and draw its predictions
# make test        run the linter, unit tests and short trainings in the toolboxes (up to 10 minutes)
# make test-unit   run the unit tests only (up to 3 minutes)
# make test-slow   run the slow tests: documentation, exports, resumed trainings, hostile files (up to 25 minutes)
# make fuzz        run ten times as many hostile files and state dicts as test-slow
# make docs        build the documentation in docs/_build
#
# Each target first creates a virtual environment with the pinned stack and installs the packages of the target.
# STACK=onedl     use the second stack
# OPS=compiled    compile the operators of mmcv instead of using those of torchvision
# ARGS=...        arguments for pytest
# PYTHON, VENV    Python interpreter, folder of the environment

STACK ?= openmmlab
OPS ?= torchvision
ifndef PYTHON
PYTHON := $(firstword $(shell command -v python3.11 || command -v python3 || command -v python))
endif
VENV ?= .venv$(if $(filter openmmlab,$(STACK)),,-$(STACK))$(if $(filter torchvision,$(OPS)),,-$(OPS))
MIM_DET := $(if $(filter onedl,$(STACK)),onedl-mmdetection,mmdet)
DEMO_CONFIG := configs/mpvit/mask-rcnn_mpvit-tiny_fpn_mini-coco.py
DEMO_DIR := work_dirs/demo
SETUP = @test -n "$(PYTHON)" || { echo "Python was not found: install Python 3.11, or make PYTHON=/path/to/python3.11"; exit 1; }; \
	$(PYTHON) tools/setup_env.py --stack $(STACK) --ops $(OPS) --venv $(VENV) --for
# One process per available core, at most 8; each takes up to 2 GB of memory.
PYTEST = python -m pytest -n $(shell $(PYTHON) -c 'import os; print(min(8, len(os.sched_getaffinity(0))))') --dist worksteal

export PATH := $(abspath $(VENV))/bin:$(PATH)
export MPLBACKEND := Agg
# Waiting OpenMP threads spin only briefly. On a machine with other busy processes, unlimited spinning makes a training
# ten times slower. On an idle machine, not spinning at all makes it 40% slower.
ifndef OMP_WAIT_POLICY
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 1000
endif
# Without nvcc, the operators are compiled for the CPU only.
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

# On the second stack, run only the tests that depend on the toolboxes.
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
