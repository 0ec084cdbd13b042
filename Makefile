# Each target sets itself up in a virtual environment of its own; nothing is installed outside this folder.

PYTHON ?= python3
DEMO_DIR ?= demo_run

.PHONY: demo test slow lint benchmarks clean

.venv-demo/ready: pyproject.toml
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m pip install --quiet --editable .
	touch $@

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[test,lint,plan,plots,onnx,beam,gcs]' 'torch==2.13.0'
	touch $@

demo: .venv-demo/ready
	.venv-demo/bin/compactlm demo --workdir=$(DEMO_DIR)

test: .venv/ready
	.venv/bin/python -m pytest -n 2 --dist loadfile

slow: .venv/ready
	.venv/bin/python -m pytest -n 2 --dist loadfile -m slow

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/shellcheck --external-sources launch/*.sh

benchmarks: .venv/ready
	.venv/bin/python benchmarks/speed.py
	.venv/bin/python benchmarks/distill_step.py
	.venv/bin/python benchmarks/distill_memory.py
	.venv/bin/python benchmarks/convbert_speed.py
	.venv/bin/python benchmarks/kernel.py
	.venv/bin/python benchmarks/loader.py

clean:
	rm -rf .venv .venv-demo .cache $(DEMO_DIR)
