# Every recipe is one line; what it calls says more. `make help` lists them.
SETUP  := packaging/dev/setup
PYTHON := $(shell $(SETUP) path)/venv/bin/python
PREFIX ?= /usr/local
# Tests run so many files at a time, most of them waiting for something; 0: one after the other, in one process.
WORKERS ?= 4
# What bench-cold measures, and how often: COLD='"vllm --standby"' ROUNDS=2 is three minutes on a machine at rest.
COLD   ?= "swap" "vllm --standby" "vllm --cold" "vllm --compiled --standby"
ROUNDS ?= 3
# Each of the processes that tests start would compile all of vllmd.
unexport PYTHONDONTWRITEBYTECODE
FAST   := not machine and not vllm and not gpu and not qemu and not clients and not images

.PHONY: help check unit lint generate fast asyncio fuzz mutants soak demo stopwatch images bench-start standbys bench-proxy bench-large bench-cold bench-check bench-records bench-schedule bench-scenes clients vllm-tests gpu-check deb rpm install
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

check: ## install what is missing (outside this folder), then run every test
	@$(SETUP) all && $(PYTHON) -m pytest -n $(WORKERS) --durations=15

unit: ## the pure tests: no process, no socket, no root; half a minute
	@$(SETUP) venv && $(PYTHON) -m pytest -n 2 -m pure $$($(PYTHON) -m tests.pure)

lint: ## style, types, and what is generated
	@$(SETUP) venv && $(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m mypy --strict vllmd && $(PYTHON) -m pytest -q -n 0 tests/test_house.py tests/cli/test_manual.py tests/client/test_sync_client.py

generate: ## write what is drawn from tables: manuals, completions, the schema, the Python clients, the dashboard
	@$(SETUP) venv && $(PYTHON) man/generate && $(PYTHON) packaging/dev/make-clients && $(PYTHON) packaging/grafana/make-dashboard

fast: ## the tests that need neither a container nor vLLM
	@$(SETUP) venv && $(PYTHON) -m pytest -n $(WORKERS) -m "$(FAST)"

asyncio: ## what clients see, on asyncio's own event loop instead of uvloop
	@$(SETUP) venv && VLLMD_SERVER_EVENT_LOOP=asyncio $(PYTHON) -m pytest -n $(WORKERS) -m "$(FAST)" tests/proxy tests/daemon tests/client tests/ollama tests/admin

fuzz: ## ten minutes each of any bytes for the proxy and random worlds for the scheduler; check has a short form of both
	@$(SETUP) venv && VLLMD_FUZZ_SECONDS=600 VLLMD_RANDOM_WORLDS=3000 $(PYTHON) -m pytest -n 2 --timeout=3600 tests/proxy/test_fuzz.py tests/core/test_random.py

mutants: ## break promises of the scheduler on purpose, one at a time: does a test notice?
	@$(SETUP) venv && $(PYTHON) -m tests.mutants

demo: ## a real model, woken through the socket, in half a minute; MODEL=sim without one, MODEL=path for vLLM
	@$(SETUP) host venv $(if $(MODEL),,llama) && $(PYTHON) packaging/demo $(if $(MODEL),--model "$(MODEL)")

bench-start: ## what waking costs: sockets, daemon, scopes
	@$(SETUP) all && $(PYTHON) -m tests.bench.start

standbys: ## a thousand hand-overs, five of six with something in their way
	@$(SETUP) venv && HAND_OVERS=1000 $(PYTHON) -m pytest -q -n 0 tests/launcher/test_handover.py -k in_a_row

soak: ## an hour of kills, stops and restarts from a seed, under load (SECONDS=3600 SEED=)
	@$(SETUP) host tree build venv && $(PYTHON) -m tests.soak.chaos $(SECONDS) $(SEED)

bench-proxy: ## the proxy beside nginx and HAProxy
	@$(SETUP) host bench venv && $(PYTHON) -m tests.bench.proxy

bench-large: ## ten thousand models, ten thousand streams, a thousand waiting requests: time, memory, the longest gap
	@$(SETUP) host bench venv && $(PYTHON) -m tests.bench.large

bench-records: ## what records, bodies and an open page cost a request; questions to a store of ten million requests
	@$(SETUP) host bench venv && $(PYTHON) -m tests.bench.records && $(PYTHON) -m tests.bench.watched

clients: ## which client can do what: docs/clients.md, with real engines behind
	@$(SETUP) venv llama vllm model clients && $(PYTHON) -m pytest -n 0 -m clients tests/clients && $(PYTHON) -m tests.clients.table

stopwatch: ## from a bare Debian 12 and 13 to the first token of a real model, each command as typed (root, network)
	@$(SETUP) host build venv bare && VLLMD_SUITE=trixie $(SETUP) bare && $(PYTHON) -m tests.bench.stopwatch

images: ## build both container images with buildah, run each, ask a real model (needs root and a network)
	@$(SETUP) images && $(PYTHON) -m pytest -n 0 -m images tests/packaging/test_images.py

vllm-tests: ## vLLM's own tests of LoRA, tokenizers and Anthropic's API, directly and through vllmd: tests/clients/vllm.md
	@$(SETUP) venv vllm model vllm-tests && $(PYTHON) -m tests.clients.vllm_tests

bench-cold: ## how long a model that is not loaded takes: swaps with and without reading ahead, vLLM alone, through vllmd and of a standby
	@$(SETUP) host venv vllm model && for what in $(COLD); do $(PYTHON) -m tests.bench.cold $$what --rounds $(ROUNDS) || exit; done

bench-check: ## does a request cost more than it did? in figures that hardly depend on who else is at work
	@$(SETUP) host bench venv && $(PYTHON) -m tests.bench.check

bench-schedule: ## the scheduling policies over traces
	@$(SETUP) venv && $(PYTHON) -m tests.bench.schedule

bench-scenes: ## waits for nothing that once were, played with the installed daemon
	@$(SETUP) host venv tree build && $(PYTHON) -m tests.bench.scenes

gpu-check: ## what we believe of a GPU, on a real NVIDIA one; needs torch and nvidia-ml-py for $GPU_PYTHON; 77 without
	@$(or $(GPU_PYTHON),python3) tests/gpu/gpu_check.py

deb: ## out/deb-bookworm/vllmd_VERSION_all.deb, built in a clean Debian
	@packaging/dev/build deb

rpm: ## out/rpm-bookworm/vllmd-VERSION-1.noarch.rpm
	@packaging/dev/build rpm

install: ## for systems without .deb or .rpm: program, units and manuals under PREFIX
	@PREFIX=$(PREFIX) packaging/install
