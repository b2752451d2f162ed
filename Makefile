# `make demo` runs the whole loop on a real retailer's year; `make test` passes the tests. Both need only python3 and make.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PORT ?= 3000
TOUR_ONLY ?=
HOUSEHOLDS ?=

.PHONY: install demo test evaluate bench attack simulate-crashes lock clean

# only the environment, to work with data of your own
install: $(VENV)/demo.stamp

demo: $(VENV)/demo.stamp
	@$(PY) -m serving demo --port $(PORT) $(if $(TOUR_ONLY),--tour-only) $(if $(HOUSEHOLDS),--households $(HOUSEHOLDS))

test: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy features models training serving
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# the quality tables of the README, on the whole data
evaluate: $(VENV)/demo.stamp
	$(PY) -m features import complete-journey
	$(PY) -m training all

# speed and memory, as ratios of things measured in one run
bench: $(VENV)/dev.stamp
	PYTHONPATH=.:tests $(PY) -W ignore tests/bench_import.py
	PYTHONPATH=.:tests $(PY) -W ignore tests/bench.py
	PYTHONPATH=.:tests $(PY) -W ignore tests/bench_offers.py
	PYTHONPATH=.:tests $(PY) -W ignore tests/bench_intake.py
	PYTHONPATH=.:tests $(PY) -W ignore tests/bench_linkage.py
	PYTHONPATH=.:tests $(PY) -W ignore tests/bench_log.py
	PYTHONPATH=.:tests $(PY) -W ignore tests/bench_growth.py
	PYTHONPATH=.:tests $(PY) -W ignore tests/bench_scale.py
	PYTHONPATH=.:tests $(PY) -W ignore tests/bench_many.py
	PYTHONPATH=.:tests $(PY) -W ignore tests/bench_spark.py
	PYTHONPATH=.:tests $(PY) -W ignore tests/bench_console.py
	PYTHONPATH=.:tests $(PY) -W ignore tests/bench_costs.py
	UBIQUO_KILLS=12 $(PY) -m pytest tests/test_intake.py -s -k whenever_the_process_is_killed

# what clients, crashes, full disks and clocks can do to a running service, and the tests that take longest; loopback only
attack: $(VENV)/dev.stamp
	PYTHONPATH=.:tests $(PY) -W ignore tests/attack.py
	$(PY) -m pytest -n 2 --dist loadfile -m evidence

# ten thousand crashes, cut connections and lost leases on a simulated clock, from seeds: some minutes
simulate-crashes: $(VENV)/dev.stamp
	PYTHONPATH=.:tests $(PY) -W ignore tests/simulate_crashes.py

$(VENV)/%.stamp: pyproject.toml requirements.lock
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@if command -v uv >/dev/null 2>&1; then \
		uv pip install --quiet --compile-bytecode --python $(PY) --constraint requirements.lock --editable '.[$*]'; \
	else \
		{ $(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null; } && \
		$(PY) -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[$*]'; \
	fi
	@touch $@

lock:
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-emit-index-url --output-file requirements.lock

clean:
	rm -rf var $(VENV)
