# make demo    trains a detector from scratch on the demonstration data and draws what it sees
# make test    runs the tests
# make docs    builds the documentation, from docs/_build/index.html on
# All make a virtual environment with the pinned stack first. STACK=onedl chooses the second stack,
# PYTHON and VENV where the interpreter is and where the environment goes.

STACK ?= openmmlab
ifndef PYTHON
PYTHON := $(firstword $(shell command -v python3.11 || command -v python3 || command -v python))
endif
VENV ?= $(if $(filter openmmlab,$(STACK)),.venv,.venv-$(STACK))
MIM_DET := $(if $(filter onedl,$(STACK)),onedl-mmdetection,mmdet)
DEMO_CONFIG := configs/mpvit/mask-rcnn_mpvit-tiny_fpn_mini-coco.py
DEMO_DIR := work_dirs/demo
# The second stack runs the tests that depend on the toolboxes, not those of the package alone.
PYTEST := python -m pytest -n 2 --dist worksteal $(if $(filter onedl,$(STACK)),-m stack) $(ARGS)

export PATH := $(abspath $(VENV))/bin:$(PATH)
export MPLBACKEND := Agg
# Without nvcc the operators are compiled for the CPU: keep away from a GPU that cannot run them.
ifeq ($(shell command -v nvcc),)
export CUDA_VISIBLE_DEVICES :=
endif

.PHONY: env demo test lint docs clean

env:
	@test -n "$(PYTHON)" || { echo "no Python found: install Python 3.11, or make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) tools/setup_env.py --stack $(STACK) --venv $(VENV)

demo: env
	python tools/dataset_converters/make_mini_coco.py data/mini
	mim train $(MIM_DET) $(DEMO_CONFIG) --gpus 0 --work-dir $(DEMO_DIR)
	python tools/visualization/predictions.py $(DEMO_CONFIG) `cat $(DEMO_DIR)/last_checkpoint` \
		--out $(DEMO_DIR)/predictions.png
	python tools/analysis_tools/curves.py $(DEMO_DIR) --out $(DEMO_DIR)/curves.png

test: env
	ruff check .
	$(PYTEST)

lint: env
	ruff check .
	ruff format --check .

docs: env
	sphinx-build -W --keep-going docs docs/_build

clean:
	rm -rf .venv .venv-onedl build docs/_build *.egg-info work_dirs data/mini
