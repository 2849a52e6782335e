# Everything a newcomer types. libtorch goes into .libtorch/ unless LIBTORCH is exported; one build profile serves all.
CARGO ?= cargo
PYTHON ?= python3
UNDERTONE := target/release/undertone
FUZZ_SECONDS ?= 450
REAL_MODEL := models/qwen2.5-coder-0.5b-instruct.gguf

# Threads that wait by spinning slow each other down ten times where other work shares the cores.
export OMP_WAIT_POLICY ?= passive

ifdef LIBTORCH
export LD_LIBRARY_PATH := $(LIBTORCH)/lib:$(LD_LIBRARY_PATH)
endif

.PHONY: help demo test test-paths test-browser look-picture real model test-real check check-cost example notebooks golden mutants bench bench-cuda fuzz fuzz-corpus setup build clean-runs

help: ## say what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

demo: build ## subliminal learning on the pocket model in two to three minutes on two cores; ends with the path of report.html
	$(UNDERTONE) run experiments/demo.toml --run runs/demo --force

test: setup ## the whole test suite
	$(CARGO) test --release --workspace --no-fail-fast

test-paths: setup ## the tests of numbers on every kernel path of this processor: AMD's, Intel's, with and without AVX2, one and two threads
	$(PYTHON) scripts/kernel_paths.py

test-browser: build ## the page of `undertone look` in Chromium, which it installs where it may; says so where it cannot
	@$(PYTHON) scripts/setup_browser.py; status=$$?; \
	if [ $$status = 3 ]; then echo "test-browser: not run, no browser"; exit 0; fi; \
	[ $$status = 0 ] && $(UNDERTONE) run browser/look.toml --run target/browser/run --force && \
		$(CARGO) test --release -p undertone-browser --test look

look-picture: build ## the README's picture of `undertone look`, from the demo's run
	@$(PYTHON) scripts/setup_browser.py
	UNDERTONE_LOOK_RUN=runs/demo $(CARGO) test --release -p undertone-browser --test look picture
	cp target/browser/picture.png docs/look.png

real: build model ## the main job on a real Qwen2.5-Coder-0.5B-Instruct: tens of minutes on two cores
	$(UNDERTONE) run experiments/real-0.5b.toml --run runs/real-0.5b --force

model: setup ## fetch that model into models/, its SHA-256 checked
	@$(PYTHON) scripts/fetch_model.py

test-real: setup model ## the tests on the real model: answers and probabilities against transformers'
	UNDERTONE_REAL_MODEL=$(CURDIR)/$(REAL_MODEL) $(CARGO) test --release --test main -- real:: --nocapture

check: setup ## what CI checks before the tests
	$(CARGO) fmt --all --check
	$(PYTHON) scripts/check_circles.py
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --workspace --no-deps --document-private-items

check-cost: setup ## the instructions of a step, counted by callgrind, against those in scripts/cost.json
	$(CARGO) build --release --workspace --example cost
	$(PYTHON) scripts/check_cost.py

example: setup ## build and run a crate outside the workspace that uses the library; libtorch's binding is not compiled again
	cp Cargo.lock examples/stranger/Cargo.lock
	cd examples/stranger && CARGO_TARGET_DIR=$(CURDIR)/target $(CARGO) run --release

# The same arithmetic on every x86-64 with AVX2: the printed pages are compared byte by byte.
notebooks: export MKL_CBWR := COMPATIBLE
notebooks: export ATEN_CPU_CAPABILITY := avx2
notebooks: setup ## run all notebooks; each prints its page and its .ipynb anew
	@for source in notebooks-rs/examples/*.rs; do \
		$(CARGO) run --release -p notebooks-rs --example $$(basename $$source .rs) || exit 1; done

golden: ## remake the golden files with transformers, PEFT and TransformerLens, in a venv of 5 GB
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r tests/golden/requirements.txt
	for case in qwen2 qwen3 variants bf16 adapters training transformer_lens chat pocket statistics iq4 recompute ledger; do .venv/bin/python tests/golden/$$case/make.py || exit 1; done

mutants: setup ## change the code in 200 places, one at a time, and see whether a test notices; hours, goes on where it was (needs cargo-mutants)
	nice -n 19 $(PYTHON) scripts/mutants.py $(MUTANTS)

bench: setup model ## undertone beside PEFT, transformers and TransformerLens (a venv of 5 GB); about an hour on two idle cores
	$(CARGO) build --release --workspace
	$(PYTHON) benchmarks/bench.py $(BENCH)

bench-cuda: setup ## nine minutes on a GPU: is it right, and how fast; target/cuda is all that another machine needs; not run on a GPU yet
	$(CARGO) build --release --workspace
	mkdir -p target/cuda
	for binary in undertone undertone-benchmarks; do strip -o target/cuda/$$binary target/release/$$binary; done
	cp scripts/check_cuda.py benchmarks/peer.py target/cuda/
	$(PYTHON) target/cuda/check_cuda.py --binaries target/cuda $(BENCH)

fuzz: setup ## every reader of files under libFuzzer, FUZZ_SECONDS each (450); prints a table
	$(PYTHON) scripts/fuzz.py --seconds $(FUZZ_SECONDS)

fuzz-corpus: setup ## each fuzz target once on its saved inputs
	$(CARGO) build --release -p undertone-fuzz
	@for target in $$(ls fuzz/corpus); do \
		target/release/$$target fuzz/corpus/$$target/* >target/fuzz.log 2>&1 || { cat target/fuzz.log; exit 1; }; \
		echo "$$target: $$(ls fuzz/corpus/$$target | wc -l) saved inputs read"; done

build: setup
	$(CARGO) build --release

setup: ## libtorch from PyPI into .libtorch/; nothing to do when it is there
	@command -v $(CARGO) >/dev/null || { echo "error: cargo is not installed; install Rust 1.90 or newer and run make again" >&2; exit 1; }
	@if [ -z "$$LIBTORCH" ] && [ ! -f .libtorch/build-version ]; then command -v $(PYTHON) >/dev/null || { echo "error: python3 is needed to fetch libtorch; install it, or export LIBTORCH as the folder of a libtorch 2.11" >&2; exit 1; }; fi
	@if [ -n "$$LIBTORCH" ] || [ ! -f .libtorch/build-version ]; then $(PYTHON) scripts/setup_libtorch.py; fi
