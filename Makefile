# Everything a newcomer or a CI needs: `make help` lists it. Each target sets up what it depends on; a second run is
# quick, because cargo, ccache and the model's folder remember the first.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# llama.cpp is compiled by cmake inside a build script; ccache keeps its objects over `make clean`.
# The names reach cmake even where ccache is installed only now, by `make setup`.
CCACHE = $(if $(shell command -v ccache),CMAKE_C_COMPILER_LAUNCHER=ccache CMAKE_CXX_COMPILER_LAUNCHER=ccache)
CARGO = env $(CCACHE) cargo

VENV := $(CURDIR)/target/venv

.PHONY: help
help: ## Show the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Install what is missing to build and test (Debian, Ubuntu)
	@scripts/setup.sh

.PHONY: model
model: setup ## Fetch the small model of the demo and the tests into the cache
	@scripts/fetch-model.sh

.PHONY: build
build: setup ## Build the release binary, target/release/capstan
	$(CARGO) build --release --locked

.PHONY: demo
demo: setup model build ## Three daemons, one model split in three, one answer
	@exec scripts/demo --capstan target/release/capstan

.PHONY: trillion
trillion: setup build ## A trillion made-up weights, four nodes, some tokens: every size holds (Linux, root, 20 GB of memory)
	@exec scripts/trillion --capstan target/release/capstan

.PHONY: venv
venv: setup
	@scripts/python-env.sh $(VENV)

.PHONY: test
test: setup model venv ## Run every test
	CAPSTAN_TEST_PYTHON=$(VENV)/bin/python $(CARGO) test --release --workspace --locked --no-fail-fast

.PHONY: sim
sim: setup ## The scheduler in virtual time: efficiency against bounds, random workloads
	$(CARGO) build --release --workspace --locked --bin capstan-sim
	target/release/capstan-sim

# What is printed is the report, a line a scenario; CHAOS_SEED repeats a run, CHAOS_ROUNDS=n breaks everything n times (3),
# CHAOS_ONLY=NAME one thing only.
CHAOS = mkdir -p target/reports && CHAOS_REPORT=$(CURDIR)/target/reports/$(1).json $(CARGO) test --release --workspace --locked --test real -- chaos_at_length --ignored --nocapture

.PHONY: chaos
chaos: setup model ## Kill, freeze and restart stages and daemons under load; no request may be lost
	$(call CHAOS,chaos)

.PHONY: soak
soak: setup model ## The same for MINUTES=n
	CHAOS_MINUTES=$(or $(MINUTES),60) $(call CHAOS,soak)

.PHONY: snapshots
snapshots: setup model model-bench ## Whether a copy of the KV cache brings a lost sequence back sooner than computing it
	$(CARGO) build --release --workspace --locked --example snapshots
	@for model in smollm2 qwen; do echo "$$model:"; target/release/examples/snapshots --model "$$(scripts/fetch-model.sh $$model)"; done

RUNS ?= 100000
.PHONY: sim-cluster
sim-cluster: setup ## What a cluster agrees on, in virtual time over failing disks and networks (RUNS=100000)
	$(CARGO) build --release --workspace --locked --bin capstan-sim-cluster
	target/release/capstan-sim-cluster --runs $(RUNS)

.PHONY: lint
lint: setup ## Formatting, clippy, rustdoc, and licences when cargo-deny is installed
	cargo fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --workspace --no-deps --locked
	@if cargo deny --version >/dev/null 2>&1; then \
	  cargo deny --locked check; \
	else \
	  echo "lint: cargo-deny is not installed, so licences and advisories were not checked; 'make deny' installs it"; \
	fi

.PHONY: deny
deny: setup ## Install cargo-deny if need be (minutes to compile), then check licences
	@cargo deny --version >/dev/null 2>&1 || cargo install --locked cargo-deny
	cargo deny --locked check

.PHONY: fmt
fmt: ## Format the code
	cargo fmt --all

.PHONY: model-bench
model-bench: model
	@scripts/fetch-model.sh qwen

# The peer's llama.cpp is built with its RPC, and so in a folder of its own; ours has none.
.PHONY: bench
bench: setup model-bench build ## Measure beside llama.cpp's RPC (BENCH=--quick: one short round)
	GGML_RPC=ON $(CARGO) build --release --locked -p capstan-llama --example rpc-peer --features rpc --target-dir target/peer
	@scripts/python-env.sh $(CURDIR)/target/bench-venv matplotlib==3.10.8
	@BENCH_COMMAND="make bench$(if $(BENCH), BENCH='$(BENCH)')" target/bench-venv/bin/python scripts/bench $(BENCH)

.PHONY: forecast
forecast: setup model-bench build ## Forecasts of two small models beside what is measured
	@scripts/forecast $(FORECAST)

.PHONY: clean
clean: ## Remove what was built (the model and ccache stay)
	cargo clean
