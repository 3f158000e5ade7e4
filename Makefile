# make train   sets up on first use, then runs the main job: data, training, report, registered model
# make test    sets up on first use, then runs the tests
PYTHON ?= python3.11
VENV   ?= .venv
RUN     = $(VENV)/bin/python
READY   = $(VENV)/.ready

export RAY_TRAIN_ENABLE_PRINT_PATCH := 0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO := 0
export MLFLOW_DISABLE_TELEMETRY := true
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: train test test-slow test-chaos test-s3 test-page cluster cluster-down docs check worlds clean help

help:
	@sed -n 's/^# make/make/p' Makefile

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch==2.13.0 -c constraints.txt
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

data/grid/manifest.json: | $(READY)
	$(RUN) jobs/ingest.py --world grid --out data/grid --size 48 --episodes 800 --frames 64 \
	  --option agents=3 --option cells=6 --option walls=3

train: $(READY) data/grid/manifest.json
	$(RUN) jobs/train.py tiny --data data/grid --workers 2

test: $(READY)
	$(RUN) -m pytest -m 'not slow' -n 2 tests/unit tests/docs tests/security tests/infra
	$(RUN) -m pytest -m 'not slow and not rgw' --durations 15 tests/services

# make test-slow   learning, promotion, runs in a bucket, rivals, clusters and servers that ask for a token or password: some minutes each
SLOW ?= slow
test-slow: $(READY)
	$(RUN) -m pytest -m '$(SLOW)' --durations 25

# make test-chaos   runs that are killed, hung and cut off: half an hour; CHAOS='chaos and not long' is a part of them
CHAOS ?= chaos
test-chaos: $(READY)
	$(RUN) -m pytest -m '$(CHAOS)'

# make test-s3   the S3 tests against Ceph RGW (installs Debian packages; needs root)
test-s3: $(READY)
	infra/rgw/install.sh
	$(RUN) -m pytest -m rgw

# make test-page   the player and its page in Chromium (installs a Debian package; needs root)
test-page: $(READY)
	infra/chromium/install.sh
	$(RUN) -m pytest -m slow tests/services/test_page.py tests/services/test_player.py tests/services/test_player_defaults.py

# make docs   the documentation as pages, in build/site; reading it needs no network
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# make cluster   Ray, MLflow and S3 on this machine, closed to strangers (METRICS=1: with Debian's Prometheus); make cluster-down stops what it started
METRICS ?=
cluster: $(READY)
	$(RUN) jobs/cluster.py up $(if $(filter-out 0,$(METRICS)),--metrics)

cluster-down: $(READY)
	$(RUN) jobs/cluster.py down

# make worlds   the real simulators: multigrid, Procgen, highway-env
worlds: $(READY)
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[worlds]'
	$(RUN) -m pip install --quiet --no-deps procgen2==0.10.7 gym3==0.3.3

# make check   format, lint, types, layers
check: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(RUN)
	$(VENV)/bin/lint-imports

clean:
	rm -rf data/grid outputs mlflow.db mlartifacts
