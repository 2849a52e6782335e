"""Keeps the tables of some claims: of outcomes.csv the lines that its tests are made from, and tests.csv and claim.toml as they are.

    python3 tests/golden/claims/make.py runs/claims-pocket 1 2 3 6 13
"""

import csv
import shutil
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent


def keep(folder):
    claim = tomllib.loads((folder / "claim.toml").read_text())
    wanted = {"delta_margin"} if any(test["kind"] == "diagonal" for test in claim["tests"]) else set()
    for test in claim["tests"]:
        for part in ("of", "minus", "all"):
            if part == "of" or part in test:
                of = test.get(part) or {}
                wanted.add((of.get("student", "student"), of.get("cell", "everywhere"), of.get("quantity", "delta_margin")))
        if test.get("over", "log2_rank") != "log2_rank":
            of = test["of"]
            wanted.add((of.get("student", "student"), of.get("cell", "everywhere"), test["over"]))
    for chosen in claim.get("chosen", []):
        aim = chosen.get("nearest") or {}
        quantity = chosen.get("lowest") or aim["quantity"]
        wanted |= {(name, "everywhere", quantity) for name in chosen["of"]} | {(chosen["name"], "everywhere", "chosen")}
        if aim:
            wanted.add((aim.get("student", "student"), aim.get("cell", "everywhere"), quantity))
        wanted |= {(name, *key[1:]) for key in list(wanted) if key[0] == chosen["name"] and key[2] != "chosen" for name in chosen["of"]}
    out = HERE / folder.name
    out.mkdir(exist_ok=True)
    for name in ("claim.toml", "tests.csv"):
        shutil.copy(folder / name, out / name)
    with open(folder / "outcomes.csv", newline="") as source, open(out / "outcomes.csv", "w", newline="") as target:
        rows = csv.DictReader(source)
        writer = csv.DictWriter(target, rows.fieldnames, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            keys = [(row["student"], cell, row["quantity"]) for cell in (row["cell"], "*")]
            if any(key in wanted for key in keys):
                writer.writerow(row)


for number in sys.argv[2:]:
    keep(Path(sys.argv[1]) / f"claim-{int(number):02}")
