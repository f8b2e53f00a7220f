# make figures     install, rebuild the laptop tier's figures from the committed trials, train one small notebook a paper, print what was found
# make smoke       install, run the smoke tier of every paper notebook, print its report
# make test        install, check the house, test the notebooks of the library, pytest
# make export      give notebooks their form, take out their outputs, write the modules that they export
# make format      put notebooks, modules, tests and benchmarks into one form, and say what ruff finds besides
# make lab         install, open JupyterLab
# make bench       install, print the benchmarks' ratios and what worsened; adds a line to benchmarks/results/<machine>.json (about 15 minutes, on an idle machine)
# make bench-gpu   install, print what a GPU makes of the recipe's options
# make faults      install, disturb real sweeps in every way that tests/faults.py knows, print the table (10 to 20 minutes)
# make fuzz        install, try 100,000 altered inputs on every reader of files from elsewhere (about 20 minutes)
# make dask-smoke  install, compare the smoke tier on Dask workers with the process pool's, byte for byte (half an hour on two cores)
# make clean       remove what can be made again (not runs/, not the data cache)
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := figures
.DELETE_ON_ERROR:
.PHONY: venv figures smoke test export format lab bench bench-gpu faults fuzz dask-smoke clean

# one thread a process: small layers are slower with two, and worker processes use the other cores
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

venv: $(INSTALLED)

$(INSTALLED): settings.ini setup.py constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "make: $(PYTHON) is not here: install Python 3.11, or name another with make PYTHON=..."; exit 1; }
	@echo "make: installing into $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,cluster]'
	@touch $@

figures: venv
	@$(BIN)/lth data fetch mnist
	@echo "make: every figure and table, from the trials in figures/laptop; nothing is trained"
	@$(BIN)/lth run --tier laptop --rebuild
	@echo "make: and one small notebook a paper, to see it train (tier smoke)"
	@$(BIN)/lth run learning_to_learn/01 weight_correlation/02 granet/02 weight_recycling/02 --tier smoke
	@$(BIN)/lth report --tier laptop --brief

smoke: venv
	$(BIN)/lth data fetch mnist
	@$(BIN)/lth data fetch fashion-mnist || echo "make: without Fashion-MNIST; notebook 07 leaves its part of it out"
	$(BIN)/lth run --tier smoke
	$(BIN)/lth report --tier smoke

test: venv
	$(BIN)/lth data fetch mnist
	$(BIN)/python -m pytest -q tests/test_house.py
	$(BIN)/nbdev_test --n_workers 2 --skip_folder_re '^([_.]|papers)'
	$(BIN)/nbdev_test --n_workers 2 --path nbs/papers --file_glob '00_*.ipynb'
	$(BIN)/python -m pytest -q -rs -n 2 --ignore=tests/test_house.py

# what a change of a notebook needs: the house's form, no outputs, its module
export: venv
	$(BIN)/ruff format --quiet
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

format: venv
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lab: venv
	$(BIN)/jupyter lab nbs

bench: venv
	$(BIN)/python benchmarks/run.py

bench-gpu: venv
	$(BIN)/python benchmarks/gpu.py

faults: venv
	$(BIN)/python tests/faults.py --out benchmarks/results/faults.csv

fuzz: venv
	$(BIN)/python tests/fuzz.py --out benchmarks/results/fuzz.csv

dask-smoke: venv
	$(BIN)/lth data fetch mnist
	$(BIN)/python tests/dask_smoke.py $(NOTEBOOKS)
	$(BIN)/python tests/dask_smoke.py --kill $(or $(NOTEBOOKS),learning_to_learn/04 weight_correlation/02 granet/04 weight_recycling/01)

clean:
	rm -rf $(VENV) build dist _docs _proc figures/smoke *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
