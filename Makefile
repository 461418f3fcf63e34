# The only entry point, for people and for CI. `make help` lists what there is.

TARGET_DIR := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
TRIPLE := x86_64-unknown-linux-gnu
RELEASE := $(TARGET_DIR)/$(TRIPLE)/release
STERNA := $(RELEASE)/sterna

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help build demo test test-programs check bench-boot bench-save bench-migrate bench-stream install clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

include resources/testbed.mk
include fuzz/fuzz.mk

# Both packages in one command: each by itself would want its dependencies with other features, and build sterna once more.
build: setup ## the release binary, and the testbed's
	@cargo build --release --package sterna --package sterna-testbed
	@echo "built $(STERNA)"

demo: build testbed-files ## a stock Debian guest boots, and moves between two hosts: live, quick, live
	@$(RELEASE)/testbed demo

# What is tested and the tests themselves are two builds, in profiles of their own: beside each other.
test: setup ## every test: unit, on /dev/kvm, and real Linux in the testbed
	@$(MAKE) --no-print-directory --jobs=2 testbed-files test-programs
	@STERNA_UNDER_TEST=$(STERNA) cargo test --workspace --no-fail-fast --lib --bins --tests 2>&1 | tee build/test.log; \
	status=$$?; awk -f resources/count-tests.awk build/test.log; exit $$status

bench-boot: build testbed-files ## exec to first instruction and memory, QEMU's microvm beside it (N=blocks)
	@cargo bench --quiet --package sterna --bench boot -- $(N)

bench-save: build ## saving, restoring and quick moves, QEMU beside it (N=blocks)
	@cargo bench --quiet --package sterna --bench save -- $(N)

bench-migrate: build ## live moves between two processes, QEMU beside it (N=blocks)
	@cargo bench --quiet --package sterna --bench migrate -- $(N)

bench-stream: ## RAM over loopback as a move sends it, plain TCP beside it
	@cargo bench --quiet --package sterna-migration --bench stream

test-programs:
	@cargo test --quiet --workspace --lib --bins --tests --no-run

check: ## format, lints, unit tests and house rules: before every commit
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets --quiet -- -D warnings
	@cargo test --workspace --lib --bins --test rules --quiet

install: build ## put sterna into /usr/local/bin
	install -m 0755 $(STERNA) /usr/local/bin/sterna

clean: ## remove what was built
	@cargo clean --quiet
	@rm -rf build
