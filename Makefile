# Two commands on a fresh machine: `make study` and `make test`. Each sets everything up by itself.
# Two stages run at a time where neither waits for the other: small models leave cores idle. JOBS=1 for one.
PYTHON ?= python3
STUDY ?= core
JOBS ?= 2
PORT ?= 5000
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cksum requirements.lock pyproject.toml | cksum | cut -d' ' -f1)
PARAMS := $(if $(filter core,$(STUDY)),params.yaml,presets/$(STUDY).yaml)
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true

# Whether Debian packages are there to be had, with the right to install them.
APT := command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]

.PHONY: study test check setup postgresql chromium tune ui lock bench clean

study: setup
	python -m attention_transfer check --params $(PARAMS)
	$(if $(filter smoke,$(STUDY)),,python -m attention_transfer plan --once --params $(PARAMS))
	python -m attention_transfer run --params $(PARAMS) --jobs $(JOBS)
	python -m attention_transfer show --params $(PARAMS)

# Tests run on two workers with a thread each: two teams of threads on two cores wait for each other.
test: setup postgresql chromium
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=30

check: setup
	ruff format --check .
	ruff check .
	mypy & types=$$!; OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile -q -m "not slow"; tests=$$?; \
	  wait $$types && exit $$tests

# Fashion-MNIST comes with a Debian package; elsewhere, or without the right to install, torchvision downloads it.
setup: $(READY)
	@if ! dpkg -L dataset-fashion-mnist >/dev/null 2>&1 && $(APT); then \
	  (apt-get update -qq && apt-get install -y -qq dataset-fashion-mnist) >/dev/null || echo "apt cannot install dataset-fashion-mnist: it will be downloaded"; fi

# Some tests start an MLflow server on PostgreSQL; they say so when they are skipped. No cluster is made here.
postgresql:
	@if ! command -v initdb >/dev/null && ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 && $(APT); then \
	  mkdir -p /etc/postgresql-common/createcluster.d; \
	  echo "create_main_cluster = false" > /etc/postgresql-common/createcluster.d/none.conf; \
	  (apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql) >/dev/null || echo "apt cannot install postgresql: its tests are skipped"; \
	  rm -f /etc/postgresql-common/createcluster.d/none.conf; fi

# Some tests look at the report and at the MLflow UI in a browser; they say so when they are skipped.
chromium:
	@if ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null && ! command -v google-chrome >/dev/null && $(APT); then \
	  (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) >/dev/null || echo "apt cannot install chromium: its tests are skipped"; fi

# Compiling the bytecode once takes half a minute and saves several seconds in each of the study's stages.
$(READY):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit("error: Python %d.%d: this needs 3.11 or 3.12; name one with: make PYTHON=python3.11" % v)'
	@echo "Sets up $(VENV), 7 GB, in some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	rm -f $(VENV)/.ready-*; touch $@

# Chooses each method's learning rate (and attention weight) on the validation split; never reads the test set.
tune: setup
	python -m attention_transfer check --params presets/tune.yaml
	python -m attention_transfer run --params presets/tune.yaml --only train --jobs $(JOBS)
	python pipeline/choose.py --params presets/tune.yaml

ui: setup
	python -m attention_transfer ui --port $(PORT)

# Wants the machine for itself; QUICK=1 only tries the code.
bench: setup
	python benchmarks/run.py $(if $(QUICK),--quick)

lock: setup
	uv pip compile --universal --python-version 3.11 --all-extras --no-annotate -q pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) .ckpt .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
