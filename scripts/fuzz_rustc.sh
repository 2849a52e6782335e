#!/bin/sh
# rustc for the workspace's own crates, with the coverage that libFuzzer is led by and with overflow checks. As cargo's
# RUSTC_WORKSPACE_WRAPPER it leaves the dependencies as they are, so that libtorch's binding is not compiled a second time.
case " $* " in
*" --crate-name "*)
    exec "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
        -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions=on -Coverflow-checks=on ;;
*) exec "$@" ;;
esac
