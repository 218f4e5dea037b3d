# Every task of the project. `make` alone lists them.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DEMO := out/demo
EVALUATE := out/evaluate
RIVALS := out/rivals
ALSO := --also dpmsolver++:12 --also dpmsolver++:16 --also dpmsolver++:20
# two workers of one thread each: more threads than cores wait for each other
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo figures evaluate clip-interval full-size rivals test test-all lint train-demo-model clean

help: ## list the tasks
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

setup: $(READY) ## make .venv with exact versions (constraints.txt)

$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: setup ## build a bundle of the demo model into out/demo and generate pictures with it, offline
	$(BIN)/python -m tools.demo $(DEMO)

lint: setup ## ruff, format, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint ## everything a reviewer would check; .ci/run calls exactly this
	$(PYTEST) -m "not slow"

test-all: lint ## the same with the slow tests
	$(PYTEST)

figures: setup ## measure and draw what README shows (docs/first_light.png and .md)
	$(BIN)/python -m benchmarks.first_light

evaluate: setup ## compare smaller bundles with float32 and rank plans (out/evaluate, docs/)
	$(BIN)/cq-edge build -o $(EVALUATE)/float32 --quantization none $(ALSO) --force
	$(BIN)/cq-edge build -o $(EVALUATE)/bundle --compression 4.1 $(ALSO) --force
	$(BIN)/cq-edge build -o $(EVALUATE)/small --compression 6 $(ALSO) --force
	$(BIN)/cq-edge evaluate $(EVALUATE)/bundle --reference $(EVALUATE)/float32 --threads 1 \
		--processes 2 --speedup 5.5 --frontier-captions 64 --json docs/evaluation.json --html $(EVALUATE)/report.html --force
	$(BIN)/python -m benchmarks.frontier_figure docs/evaluation.json docs/frontier.png
	$(BIN)/cq-edge evaluate $(EVALUATE)/small --reference $(EVALUATE)/float32 --threads 1 \
		--processes 2 --speedup 8 --captions 64 --frontier-captions 0 --json docs/evaluation_8x_6x.json --force
	$(BIN)/python -m benchmarks.plan_ranking $(EVALUATE)/bundle --reference $(EVALUATE)/float32 \
		--captions 12 --threads 1
	$(BIN)/python -m benchmarks.forecasts $(EVALUATE)/bundle --reference $(EVALUATE)/float32 --threads 1

clip-interval: setup ## draw what docs/clip_scores.jsonl lacks of 15,232 captions, and compute its CLIP interval
	$(BIN)/python -m benchmarks.clip_interval $(EVALUATE)/bundle --reference $(EVALUATE)/float32 \
		--evaluation docs/evaluation.json --scores docs/clip_scores.jsonl --captions 15232 \
		--ours-alone --known docs/clip_interval.json --json docs/clip_scores.json

full-size: setup ## what a model of Stable Diffusion 1.5's size takes (docs/benchmarks.md; 6 GB of disk)
	$(BIN)/python -m tools.random_pipeline sd15 out/models/sd15 --force
	$(BIN)/python -m benchmarks.full_size out/models/sd15

rivals: ## compare the bundles of `make evaluate` with what else runs such models (docs/benchmarks.md)
	$(PYTHON) -m venv $(RIVALS)/venv
	CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON" $(RIVALS)/venv/bin/python -m pip install \
		--quiet --constraint constraints.txt --editable . -r benchmarks/rivals-requirements.txt
	rm -rf $(RIVALS)/demo
	$(RIVALS)/venv/bin/python -m benchmarks.rivals --work $(RIVALS)/demo

train-demo-model: setup ## train, package and judge the demo model (hours on a CPU)
	$(BIN)/python -m tools.train_demo_model

clean: ## remove the environment and everything made
	rm -rf $(VENV) out .mypy_cache .pytest_cache .ruff_cache
