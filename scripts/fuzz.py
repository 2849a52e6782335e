"""Runs the fuzz targets for a while each and prints what came of it as a Markdown table.

python3 scripts/fuzz.py [--seconds N] [TARGET ...]

The workspace's crates are compiled once more, with the coverage that libFuzzer is led by (scripts/fuzz_rustc.sh). Inputs that
reach new code are kept in target/fuzz/TARGET beside the saved ones in fuzz/corpus, an input that fails in fuzz/artifacts.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
FUZZ = TARGET / "fuzz"
# A reader that takes longer than a minute (of wall time, so as not to find a busy machine) or half a gigabyte at once is a finding, as a panic is.
LIMITS = ["-timeout=60", "-rss_limit_mb=2048", "-malloc_limit_mb=512", "-max_len=8192", "-print_final_stats=1"]


def build(targets):
    wrapped = os.environ | {"RUSTC_WORKSPACE_WRAPPER": str(ROOT / "scripts/fuzz_rustc.sh")}
    subprocess.run(["cargo", "build", "--release", "-p", "undertone-fuzz"], cwd=ROOT, env=wrapped, check=True)
    FUZZ.mkdir(exist_ok=True)
    for target in targets:  # away from where another build puts its own
        shutil.copy2(TARGET / "release" / target, FUZZ / f"{target}.bin")


def run(target, seconds):
    kept, artifacts = FUZZ / target, ROOT / "fuzz/artifacts"
    kept.mkdir(exist_ok=True)
    artifacts.mkdir(exist_ok=True)
    flags = [f"-max_total_time={seconds}", f"-artifact_prefix={artifacts}/{target}-", *LIMITS]
    command = [FUZZ / f"{target}.bin", *flags, kept, ROOT / "fuzz/corpus" / target]
    start = time.time()
    done = subprocess.run(command, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    (FUZZ / f"{target}.log").write_text(done.stdout)
    last = lambda pattern, default="?": (re.findall(pattern, done.stdout) or [default])[-1]
    found = "none" if done.returncode == 0 else last(r"SUMMARY: libFuzzer: (.*)", "see the log")
    return {
        "target": target,
        "wall time, s": round(time.time() - start),
        "executions": last(r"stat::number_of_executed_units:\s*(\d+)"),
        "edges at the start": (re.findall(r"INITED cov: (\d+)", done.stdout) or ["?"])[0],
        "edges at the end": last(r"cov: (\d+)"),
        "inputs kept": last(r"corp: (\d+)"),
        "failures": found,
    }


def main():
    targets = [target["name"] for target in tomllib.loads((ROOT / "fuzz/Cargo.toml").read_text())["bin"]]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=450, help="for each target (450)")
    parser.add_argument("targets", nargs="*", choices=[*targets, []], metavar="TARGET", help=", ".join(targets))
    chosen = parser.parse_args()
    chosen.targets = chosen.targets or targets
    build(chosen.targets)
    rows = []
    for target in chosen.targets:
        rows.append(run(target, chosen.seconds))
        print(*rows[-1].values(), sep=" | ", file=sys.stderr, flush=True)
    for cells in [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]:
        print("| " + " | ".join(map(str, cells)) + " |")
    return 0 if all(row["failures"] == "none" for row in rows) else 1


sys.exit(main())
