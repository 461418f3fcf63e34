# Bad input, guided by coverage. Included by the top Makefile. No nightly and no cargo-fuzz: the coverage pass is a flag of the
# stable compiler, and libFuzzer a crate. See fuzz/README.md.

FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= $(sort $(basename $(notdir $(wildcard fuzz/targets/*.rs))))
# One input never takes so long, seconds, nor so much memory, MiB.
FUZZ_OPTIONS ?= -timeout=10 -rss_limit_mb=2048 -max_len=4096 -len_control=20 -print_final_stats=1
# In the environment, so that they replace those of .cargo/config.toml: libFuzzer is C++ and not linked statically.
FUZZ_FLAGS := --cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares
FUZZ_TARGET_DIR := $(TARGET_DIR)/fuzz
FUZZ_BIN := $(FUZZ_TARGET_DIR)/$(TRIPLE)/release

.PHONY: fuzz fuzz-build

fuzz-build: setup
	@command -v g++ >/dev/null || DEBIAN_FRONTEND=noninteractive apt-get install -qqy g++
	@cd fuzz && RUSTFLAGS="$(FUZZ_FLAGS)" cargo build --release --quiet --target $(TRIPLE) --target-dir $(FUZZ_TARGET_DIR)

fuzz: fuzz-build ## bad input to devices, kernels, control, moves: a minute each (FUZZ_SECONDS=n FUZZ_TARGETS="blk net")
	@mkdir -p $(addprefix fuzz/artifacts/,$(FUZZ_TARGETS)) $(addprefix fuzz/corpus/,$(FUZZ_TARGETS)) && cd fuzz && \
	failed=; for target in $(FUZZ_TARGETS); do \
		log=artifacts/$$target/log; printf '%-10s' $$target; \
		if $(FUZZ_BIN)/$$target corpus/$$target $$(find seeds/$$target -maxdepth 0 2>/dev/null) \
			-artifact_prefix=artifacts/$$target/ -max_total_time=$(FUZZ_SECONDS) $(FUZZ_OPTIONS) >$$log 2>&1; then \
			awk '/DONE/ { cov = $$4 " edges, " $$6 " features" } /average_exec_per_sec/ { rate = $$2 } \
				END { print "ok: " cov ", " rate " inputs/s" }' $$log; \
		else \
			echo "FAILED"; tail -n 25 $$log; failed="$$failed $$target"; \
		fi; \
	done; [ -z "$$failed" ] || { echo "fuzz: failed:$$failed (fuzz/README.md says how to reproduce)"; exit 1; }
