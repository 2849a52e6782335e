"""Would a test notice? Changes the code that numbers pass through in one place at a time, and runs the tests on each.

cargo-mutants (`cargo install cargo-mutants --locked`) lists what can be changed; SAMPLE of these are drawn with SEED. Each is tried in a work tree of its own
beside the checkout, first by its crate's own tests and, where these notice nothing, by the integration tests of numbers. What is found is
kept in docs/mutants.csv line by line, so that a broken-off run goes on where it was.

    python3 scripts/mutants.py                 # all that is not tried yet; some minutes each
    python3 scripts/mutants.py --hours 2       # for so long
    python3 scripts/mutants.py --list          # what is drawn

A survivor changes no number, and docs/testing.md says why, or gets a test.
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT.parent / f"{ROOT.name}-mutants"  # outside it: below, cargo would read both configurations
RESULTS = ROOT / "docs" / "mutants.csv"
CARGO = os.environ.get("CARGO", "cargo")
SEED, SAMPLE = 17, 200

FILES = [
    *(f"hooks/src/{name}.rs" for name in ["gate", "lora", "packing", "loss", "stack", "qwen/by_hand", "kv_cache", "score", "gradient"]),
    *(f"analyses/src/{name}.rs" for name in ["direction", "gradients", "divergence", "inference"]),
    "src/claim/verdict.rs",
]
# What cargo builds and which of its tests run: first each crate's own tests, then the other crates' tests of numbers.
OWN = {
    "hooks": (["-p", "undertone-hooks", "--lib"], []),
    "analyses": (["-p", "undertone-analyses", "--lib"], []),
    "src": (["-p", "undertone", "--lib"], ["claim"]),
}
OTHERS = [
    (["-p", "undertone-analyses", "--lib"], []),
    (["-p", "undertone", "--lib"], ["finetune", "claim"]),
    (["-p", "undertone", "--test", "main"], ["parity::", "training::", "adapters::", "pipeline::", "recompute::", "claims::"]),
]
LIMIT = 1200  # seconds, for mutants that loop for ever


def drawn() -> list[dict]:
    """The sample, in the order in which it was drawn. It depends on the files' current text."""
    if subprocess.run([CARGO, "mutants", "--version"], capture_output=True).returncode:
        sys.exit("error: cargo-mutants is not installed; hint: cargo install cargo-mutants --locked")
    command = [CARGO, "mutants", "--list", "--json", "--workspace", *(word for file in FILES for word in ("--file", file))]
    found = json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout)
    missing = set(FILES) - {mutant["file"] for mutant in found}
    assert not missing, f"cargo-mutants finds nothing to change in {sorted(missing)}"
    found.sort(key=lambda mutant: mutant["name"])
    return random.Random(SEED).sample(found, SAMPLE)


def changed(text: str, mutant: dict) -> str:
    lines = text.split("\n")
    start, end = mutant["span"]["start"], mutant["span"]["end"]

    def offset(place: dict) -> int:
        return sum(len(line) + 1 for line in lines[: place["line"] - 1]) + place["column"] - 1

    return text[: offset(start)] + mutant["replacement"] + text[offset(end) :]


def tree() -> None:
    """Puts the checkout's last commit into its own folder, with its own target folder."""
    if not TREE.exists():
        subprocess.run(["git", "worktree", "add", "--detach", TREE, "HEAD"], cwd=ROOT, check=True)
    subprocess.run(["git", "checkout", "--quiet", "--detach", "--force", head()], cwd=TREE, check=True)


def head() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout.strip()


def tests(built: list[str], run: list[str]) -> str:
    """`passed`, `failed`, `timeout`, or `unbuildable` if the changed code does not compile."""
    libtorch = os.environ.get("LIBTORCH", str(ROOT / ".libtorch"))
    environment = {**os.environ, "LIBTORCH": libtorch, "LD_LIBRARY_PATH": f"{libtorch}/lib"}
    command = [CARGO, "test", "--release", *built]
    for arguments, otherwise in (["--no-run"], "unbuildable"), (["--", *run], "failed"):
        try:
            done = subprocess.run([*command, *arguments], cwd=TREE, env=environment, capture_output=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return "timeout"
        if done.returncode:
            return otherwise
    return "passed"


def fate(mutant: dict) -> str:
    """The tests that notice a mutant, or `survived`."""
    path = TREE / mutant["file"]
    whole = path.read_text()
    path.write_text(changed(whole, mutant))
    try:
        own = OWN[mutant["file"].split("/")[0]]
        for built, run in [own, *(others for others in OTHERS if others[0] != own[0])]:
            found = tests(built, run)
            if found != "passed":
                return found if found == "unbuildable" else f"{found} {' '.join(built)}"
        return "survived"
    finally:
        path.write_text(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1000)
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    sample = drawn()
    if arguments.list:
        print("\n".join(mutant["name"] for mutant in sample))
        return
    tree()
    known = {}
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            known = {row["mutant"]: row["fate"] for row in csv.DictReader(file)}
    for built, run in [*OWN.values(), *OTHERS]:
        if tests(built, run) != "passed":
            sys.exit(f"error: without a change cargo test {' '.join(built)} does not pass, so nothing could be told; see {TREE}")
    begun = time.monotonic()
    for mutant in sample:
        if time.monotonic() - begun > 3600 * arguments.hours:
            break
        if mutant["name"] in known:
            continue
        known[mutant["name"]] = fate(mutant)
        print(mutant["name"], known[mutant["name"]], flush=True)
        with RESULTS.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("mutant", "fate"), *known.items()])
    tried = [known[mutant["name"]] for mutant in sample if mutant["name"] in known]
    real = [found for found in tried if found != "unbuildable"]
    noticed = sum(found != "survived" for found in real)
    print(f"{len(tried)} of {SAMPLE} tried, {len(tried) - len(real)} are no programs; of {len(real)} the tests notice {noticed}")
    sys.exit(0 if noticed == len(real) else 1)


if __name__ == "__main__":
    main()
