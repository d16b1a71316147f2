.PHONY: setup lint types test bench demo
BIN = .venv/bin

setup: ; python3 -m venv .venv && $(BIN)/pip install -c constraints.txt -e '.[dev]'
lint: ; $(BIN)/ruff check . && $(BIN)/ruff format --check . && PYTHONPATH=.:kernels $(BIN)/lint-imports
types: ; $(BIN)/mypy
test: ; OMP_NUM_THREADS=1 $(BIN)/pytest -q
bench: ; OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.side_by_side
demo: ; $(BIN)/hf-accel demo
