"""Runs the tests that compare numbers on every kernel path of this processor, and prints a table.

libtorch and its MKL choose their kernels by the processor, so a test that passes on one machine may fail on the next. This script
forces the choice. Each path is one that some machine takes by itself:

    AMD's        MKL sees another vendor's processor and gives it older kernels
    Intel's      MKL sees an Intel
    COMPATIBLE   MKL's kernels that give the same bytes everywhere
    ATen default, ATen avx2   libtorch's own kernels without and with AVX2
    one thread, two threads   sums in other parts

The programs answer MKL's question for the vendor (`hooks/src/mkl.rs`), as a variable says. Standard library alone.

    python3 scripts/kernel_paths.py            # builds the tests, then runs them on every path
    python3 scripts/kernel_paths.py "AMD's"    # on one
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "target" / "kernel-paths"
CARGO = os.environ.get("CARGO", "cargo")

# The tests to run of each binary: all of the libraries', and those of the others that compare numbers.
BINARIES = {
    "hooks": [],
    "analyses": [],
    "undertone": ["training::", "teacher::"],
    "main": ["parity::", "training::", "adapters::", "pocket::", "pipeline::", "exports::", "recompute::", "ledger::the_books"],
}


def paths() -> dict[str, dict[str, str]]:
    return {
        "AMD's": {"UNDERTONE_MKL_INTEL": "0"},
        "Intel's": {"UNDERTONE_MKL_INTEL": "1"},
        "COMPATIBLE": {"MKL_CBWR": "COMPATIBLE"},
        "ATen default": {"ATEN_CPU_CAPABILITY": "default"},
        "ATen avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
        "one thread": {"OMP_NUM_THREADS": "1"},
        "two threads": {"OMP_NUM_THREADS": "2"},
    }


def binaries(root: Path = ROOT) -> dict[str, tuple[Path, Path]]:
    """Each test binary of a checkout by its name, with the folder of its package."""
    command = [CARGO, "test", "--release", "--workspace", "--no-run", "--message-format=json"]
    told = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = {}
    for line in told.splitlines():
        message = json.loads(line)
        is_program = message.get("target", {}).get("kind") == ["bin"]  # named like the library, without tests of its own
        if message.get("executable") and message["profile"]["test"] and not is_program:
            found[message["target"]["name"]] = (Path(message["executable"]), Path(message["manifest_path"]).parent)
    missing = BINARIES.keys() - found.keys()
    assert not missing, f"cargo built no tests of {sorted(missing)}"
    return {name: found[name] for name in BINARIES}


def libraries() -> str:
    """LD_LIBRARY_PATH with libtorch's folder."""
    libtorch = Path(os.environ.get("LIBTORCH", ROOT / ".libtorch"))
    return os.pathsep.join(filter(None, [str(libtorch / "lib"), os.environ.get("LD_LIBRARY_PATH")]))


def check_words(words: dict[str, list[str]], tests: dict[str, tuple[Path, Path]]) -> None:
    """Each word selects a test: one that none has would leave tests out in silence."""
    for name, chosen in words.items():
        binary, folder = tests[name]
        environment = {**os.environ, "LD_LIBRARY_PATH": libraries(), "CARGO_MANIFEST_DIR": str(folder)}
        for word in chosen:
            listed = subprocess.run([binary, word, "--list"], cwd=folder, env=environment, stdout=subprocess.PIPE, check=True, text=True)
            if not re.search(r": test$", listed.stdout, re.M):
                sys.exit(f"error: no test of {name} has {word!r} in its name; hint: give the names of today")


def run(path: str, forced: dict[str, str], tests: dict[str, tuple[Path, Path]]) -> tuple[int, list[str]]:
    """How many tests passed on the path, and the names of those that failed."""
    environment = {**os.environ, "LD_LIBRARY_PATH": libraries(), **forced}
    passed, failed = 0, []
    for name, (binary, folder) in tests.items():
        done = subprocess.run(
            [binary, *BINARIES[name]],
            cwd=folder,
            env={**environment, "CARGO_MANIFEST_DIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        result = re.search(r"^test result: \w+\. (\d+) passed; (\d+) failed", done.stdout, re.M)
        if result:
            passed += int(result[1])
            failed += [f"{name} {test}" for test in re.findall(r"^test (\S+) .*FAILED$", done.stdout, re.M)]
        if done.returncode:
            log = FOLDER / f"{re.sub(r'[^a-z]+', '-', path.lower())}-{name}.log"
            log.write_text(done.stdout)
            print(f"{path}: {name} failed; all of what it said is in {log.relative_to(ROOT)}")
            print("\n".join(re.findall(r"^thread '.*panicked at.*\n.*$", done.stdout, re.M)[:20]), flush=True)
            failed = failed or [name]
    return passed, failed


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = sys.argv[1:]
    unknown = [path for path in wanted if path not in paths()]
    if unknown:
        sys.exit(f"error: no kernel path {unknown[0]}; there are {', '.join(paths())}")
    tests = binaries()
    check_words(BINARIES, tests)
    every = {path: forced for path, forced in paths().items() if not wanted or path in wanted}
    broken = 0
    print(f"{'path':<14}{'passed':>8}{'failed':>8}{'seconds':>9}", flush=True)
    for path, forced in every.items():
        begun = time.monotonic()
        passed, failed = run(path, forced, tests)
        broken += len(failed)
        print(f"{path:<14}{passed:>8}{len(failed):>8}{time.monotonic() - begun:>9.0f}  {' '.join(failed)}", flush=True)
        if not passed:
            sys.exit(f"error: no test ran on the path {path}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
