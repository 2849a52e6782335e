"""Counts the instructions of a step with callgrind and compares them with those in scripts/cost.json.

The clock of a shared machine cannot tell five per cent; a count of instructions can. examples/cost.rs runs a Qwen of 24
narrow layers on one thread; the kernels of libtorch and MKL are pinned, and valgrind stands for one CPU on all machines. A
count that is more than 5 % above the committed one fails. `--renew` writes the counts anew; commit them with the reason.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

COUNTS = pathlib.Path(__file__).with_name("cost.json")
LIMIT = 1.05
PINNED = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def total(path):
    """The instructions in one file of callgrind's."""
    found = re.search(r"^totals: (\d+)$", path.read_text(errors="replace"), re.MULTILINE)
    if not found:
        sys.exit(f"error: {path.name} of callgrind has no line of totals; hint: run this with valgrind 3.19 or newer")
    return int(found.group(1))


def count(program):
    """The instructions of a step by name."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "out")
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--collect-atstart=no", "--dump-line=no"]
        # The whole name: of two options with the same pattern callgrind 3.19 obeys only one.
        command += ["--toggle-collect=cost::counted", "--dump-after=cost::counted", program]
        done = subprocess.run(command, env={**os.environ, **PINNED}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        steps = {}
        for at, line in enumerate(done.stdout.splitlines()):
            name, few, more = line.split()
            first, second = (total(pathlib.Path(f"{out}.{2 * at + n}")) for n in (1, 2))
            steps[name] = round((second - first) / (int(more) - int(few)))
        return steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", nargs="?", default="target/release/examples/cost")
    parser.add_argument("--renew", action="store_true", help="write the counts into scripts/cost.json")
    arguments = parser.parse_args()
    if not shutil.which("valgrind"):
        sys.exit("error: valgrind is not installed, and instructions are counted with it; hint: apt-get install valgrind")
    found = count(arguments.program)
    if arguments.renew:
        COUNTS.write_text(json.dumps(found, indent=2) + "\n")
        return print(f"{COUNTS.name}: {len(found)} counts written")
    committed = json.loads(COUNTS.read_text())
    if committed.keys() != found.keys():
        sys.exit(f"error: {COUNTS} counts {', '.join(committed)}, the program {', '.join(found)}; hint: --renew")
    print(f"{'instructions of one':20}{'committed':>15}{'now':>15}{'change':>9}")
    for name, now in found.items():
        print(f"{name:20}{committed[name]:>15,}{now:>15,}{100 * (now / committed[name] - 1):>+8.1f} %")
    above = [name for name, now in found.items() if now > LIMIT * committed[name]]
    if above:
        sys.exit(
            f"error: {', '.join(above)} takes more than 5 % more instructions than {COUNTS} says; hint: find what was added, or, "
            f"where it is worth that, python3 scripts/check_cost.py --renew"
        )


if __name__ == "__main__":
    main()
