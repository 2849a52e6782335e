"""Would a test notice? Changes the code that numbers pass through in one place at a time, and runs the tests on each.

cargo-mutants (`cargo install cargo-mutants --locked`) lists what can be changed, and SAMPLE of these are drawn with SEED. All of them are compiled at
once into one copy of the program, in a work tree beside the checkout: each function with a mutant holds its body as it is and as it would be, and the
variable UNDERTONE_MUTANT says which is run. What does not compile so is compiled alone. A mutant's own crate is tested first, then the others, up to
the first test that fails. docs/mutants.csv keeps each result at once, so that a stopped run continues.

    python3 scripts/mutants.py                 # all that is not tried yet: a build, then up to three minutes each
    python3 scripts/mutants.py --hours 1       # for so long
    python3 scripts/mutants.py --list          # what is drawn
    python3 scripts/mutants.py --again         # the survivors once more, after a test was added

A survivor changes no number, and docs/testing.md says why, or gets a test.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from kernel_paths import binaries, check_words  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT.parent / f"{ROOT.name}-mutants"  # not below it: cargo would read both configurations
RESULTS = ROOT / "docs" / "mutants.csv"
CARGO = os.environ.get("CARGO", "cargo")
SEED, SAMPLE = 17, 200
SURVIVED, UNBUILDABLE = "survived", "no program"

FILES = [
    *(f"hooks/src/adapter/{name}.rs" for name in ["gate", "lora", "stack"]),
    *(f"hooks/src/rows/{name}.rs" for name in ["packing", "kv_cache"]),
    *(f"hooks/src/model/{name}.rs" for name in ["loss", "qwen/lora_backward"]),
    *(f"hooks/src/ask/{name}.rs" for name in ["prefill", "score", "gradient"]),
    *(f"analyses/src/{name}.rs" for name in ["direction", "direction/geometry", "gradients", "gradients/report", "divergence", "inference"]),
    "src/claim/estimate.rs",
    "src/claim/verdict.rs",
]
# The tests that are asked, in this order but for a crate's own, which come first: all of a binary's, or those whose names have such a word.
TESTS = {
    "hooks": [],
    "analyses": [],
    "undertone": ["training::", "claim"],
    "main": ["parity::", "training::", "adapters::", "pipeline::", "recompute::", "claims::"],
}
OWN = {"hooks": "hooks", "analyses": "analyses", "src": "undertone"}
SWITCH = """
/// Which mutant is run: the number in UNDERTONE_MUTANT.
#[doc(hidden)]
pub mod mutant {
    /// Whether it is this one.
    pub fn is(number: usize) -> bool {
        static RUN: std::sync::OnceLock<Option<usize>> = std::sync::OnceLock::new();
        *RUN.get_or_init(|| std::env::var("UNDERTONE_MUTANT").ok()?.parse().ok()) == Some(number)
    }
}
"""


def drawn() -> list[dict]:
    """The sample in the order in which it is drawn: by a hash of the seed and the mutant's name, which has no line, so that a change of the code
    elsewhere draws no others."""
    if subprocess.run([CARGO, "mutants", "--version"], capture_output=True).returncode:
        sys.exit("error: cargo-mutants is not installed; hint: cargo install cargo-mutants --locked")
    command = [CARGO, "mutants", "--list", "--json", "--workspace", *(word for file in FILES for word in ("--file", file))]
    found = json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout)
    missing = set(FILES) - {mutant["file"] for mutant in found}
    assert not missing, f"cargo-mutants finds nothing to change in {sorted(missing)}"
    found.sort(key=lambda mutant: (mutant["file"], mutant["span"]["start"]["line"], mutant["span"]["start"]["column"]))
    seen = Counter()
    for mutant in found:
        mutant["name"] = re.sub(r":\d+:\d+: ", ": ", mutant["name"])
        seen[mutant["name"]] += 1
        if seen[mutant["name"]] > 1:
            mutant["name"] += f" ({seen[mutant['name']]})"
    return sorted(found, key=lambda mutant: hashlib.sha256(f"{SEED} {mutant['name']}".encode()).hexdigest())[:SAMPLE]


def offsets(text: str, span: dict) -> tuple[int, int]:
    lines = text.split("\n")

    def offset(place: dict) -> int:
        return sum(len(line) + 1 for line in lines[: place["line"] - 1]) + place["column"] - 1

    return offset(span["start"]), offset(span["end"])


def body(text: str, start: int, end: int) -> tuple[int, int]:
    """Where the body of a function lies: from its first brace outside of its parameters to its end."""
    words = r'//[^\n]*|/\*.*?\*/|r(#*)".*?"\1|"(?:\\.|[^"\\])*"|\'(?:\\[^\']*|[^\\\'])\''
    bare = re.sub(words, lambda match: " " * len(match[0]), text[start:end], flags=re.S)
    depth = 0
    for at, letter in enumerate(bare):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(letter, 0)
        if letter == "{" and depth == 0:
            return start + at, end
    raise ValueError(f"a function without a body: {text[start:end][:100]}")


def tree() -> None:
    """Checks the last commit out into a work tree with its own target folder."""
    if not TREE.exists():
        subprocess.run(["git", "worktree", "add", "--detach", TREE, "HEAD"], cwd=ROOT, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout.strip()
    subprocess.run(["git", "checkout", "--quiet", "--detach", "--force", head], cwd=TREE, check=True)
    libtorch = os.environ.setdefault("LIBTORCH", str(ROOT / ".libtorch"))
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [f"{libtorch}/lib", os.environ.get("LD_LIBRARY_PATH")]))


def with_all(mutants: dict[int, dict]) -> dict[tuple[str, int], int]:
    """Writes all mutants into the tree; returns the mutant of each line."""
    lines = {}
    for file in FILES:
        whole = (ROOT / file).read_text()
        functions = defaultdict(list)
        for number, mutant in mutants.items():
            if mutant["file"] == file:
                functions[body(whole, *offsets(whole, mutant["function"]["span"]))].append(number)
        parts, at, line = [], 0, 1

        def put(text: str) -> None:
            nonlocal line
            parts.append(text)
            line += text.count("\n")

        for start, end in sorted(functions):
            assert at <= start, f"{file}: a function with mutants inside of another"
            put(whole[at:start] + "{ ")
            for number in functions[start, end]:
                first, last = offsets(whole, mutants[number]["span"])
                begun = line
                crate = "crate" if file.startswith("hooks/") else "hooks"
                put(f"if {crate}::mutant::is({number}) {whole[start:first]}{mutants[number]['replacement']}{whole[last:end]}\n else ")
                lines |= {(file, place): number for place in range(begun, line)}
            put(whole[start:end] + " }")
            at = end
        put(whole[at:])
        (TREE / file).write_text("".join(parts))
    (TREE / "hooks/src/lib.rs").write_text((ROOT / "hooks/src/lib.rs").read_text() + SWITCH)
    return lines


def wrong(lines: dict[tuple[str, int], int]) -> set[int]:
    """The mutants that do not compile beside the others."""
    command = [CARGO, "check", "--release", "--workspace", "--lib", "--message-format=json"]
    told = subprocess.run(command, cwd=TREE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found = set()
    for message in map(json.loads, told.stdout.splitlines()):
        if message.get("reason") == "compiler-message" and message["message"]["level"] == "error":
            for span in message["message"]["spans"]:
                file = str(Path(span["file_name"]))
                file = file if file in FILES else str(Path(message["manifest_path"]).parent.relative_to(TREE) / file)
                found |= {lines[file, line] for line in range(span["line_start"], span["line_end"] + 1) if (file, line) in lines}
    assert found or told.returncode == 0, f"the tree does not compile, and no mutant is to blame; see {TREE}"
    return found


def noticed_by(binary: Path, folder: Path, words: list[str], number: int | None, limit: float) -> str | None:
    """The first test that fails, or what else went wrong; none where all pass."""
    environment = {**os.environ, "CARGO_MANIFEST_DIR": str(folder), "UNDERTONE_MUTANT": "" if number is None else str(number)}
    running = subprocess.Popen([binary, *words], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace")
    late = threading.Event()
    timer = threading.Timer(limit, lambda: (late.set(), running.kill()))
    timer.start()
    try:
        for line in running.stdout:
            failed = re.match(r"test (\S+) .*FAILED$", line.strip())
            if failed:
                running.kill()
                running.wait()
                return failed[1]
        running.wait()
    finally:
        timer.cancel()
    return "too late" if late.is_set() else "a crash" if running.returncode else None


def fate(file: str, tests: dict[str, tuple[Path, Path]], number: int | None, limits: dict[str, float]) -> str:
    own = OWN[file.split("/")[0]]
    for name in [own, *(name for name in TESTS if name != own)]:
        found = noticed_by(*tests[name], TESTS[name], number, limits[name])
        if found:
            return f"{name}: {found}"
    return SURVIVED


def alone(mutant: dict, limits: dict[str, float]) -> str:
    path = TREE / mutant["file"]
    whole = (ROOT / mutant["file"]).read_text()
    first, last = offsets(whole, mutant["span"])
    path.write_text(whole[:first] + mutant["replacement"] + whole[last:])
    try:
        tests = binaries(TREE)
    except subprocess.CalledProcessError:
        return UNBUILDABLE
    finally:
        path.write_text(whole)
    return fate(mutant["file"], tests, None, limits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1000)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    sample = drawn()
    if arguments.list:
        print("\n".join(mutant["name"] for mutant in sample))
        return
    begun = time.monotonic()
    known = {}
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            known = {row["mutant"]: row["noticed_by"] for row in csv.DictReader(file)}
    names = {mutant["name"] for mutant in sample}
    known = {name: found for name, found in known.items() if name in names and not (arguments.again and found == SURVIVED)}
    left = {number: mutant for number, mutant in enumerate(sample) if mutant["name"] not in known}

    def keep(mutant: dict, found: str) -> None:
        known[mutant["name"]] = found
        print(f"{len(known)} of {len(sample)}  {mutant['name']}  {found}", flush=True)
        with RESULTS.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("mutant", "noticed_by"), *known.items()])

    if left:
        tree()
        together, single = dict(left), {}
        while out := wrong(with_all(together)):
            single |= {number: together.pop(number) for number in out}
        tests = binaries(TREE)
        check_words(TESTS, tests)
        limits = {}
        for name, (binary, folder) in tests.items():
            since = time.monotonic()
            found = noticed_by(binary, folder, TESTS[name], None, 3600)
            if found:
                sys.exit(f"error: without a mutant the test {found} of {name} fails, so nothing could be told; see {TREE}")
            limits[name] = 60 + 10 * (time.monotonic() - since)
        print(f"{len(together)} mutants in one program, {len(single)} alone; built after {time.monotonic() - begun:.0f} s", flush=True)
        for number, mutant in together.items():
            if time.monotonic() - begun < 3600 * arguments.hours:
                keep(mutant, fate(mutant["file"], tests, number, limits))
        with_all({})
        for mutant in single.values():
            if time.monotonic() - begun < 3600 * arguments.hours:
                keep(mutant, alone(mutant, limits))
    real = [found for found in known.values() if found != UNBUILDABLE]
    noticed = sum(found != SURVIVED for found in real)
    print(f"{len(known)} of {SAMPLE} tried, {len(known) - len(real)} are no programs; of {len(real)} the tests notice {noticed}")
    sys.exit(0 if noticed == len(real) else 1)


if __name__ == "__main__":
    main()
