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
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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

.PHONY: venv
venv: setup
	@scripts/python-env.sh $(VENV)

.PHONY: test
test: setup model venv ## Run every test
	CAPSTAN_TEST_PYTHON=$(VENV)/bin/python $(CARGO) test --release --workspace --locked

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

.PHONY: clean
clean: ## Remove what was built (the model and ccache stay)
	cargo clean
