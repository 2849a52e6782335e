"""Prints the verdicts of claims as a table for a page, from their folders.

    python3 scripts/claims_table.py runs/claims-pocket
"""

import csv
import sys
import tomllib
from pathlib import Path


def number(row):
    if not row["estimate"]:
        return "none"
    digits = 2 if abs(float(row["estimate"])) >= 0.1 else 3
    value = lambda name: f"{float(row[name]):+.{digits}f}".replace("-", "−")
    if row["low"]:
        return f"{value('estimate')} ({value('low')} to {value('high')})"
    return value("estimate") + (f", p {float(row['p']):.2f}" if row["p"] else "")


print("| | claim | verdict | what was expected, and found |\n|---|---|---|---|")
for folder in sorted(Path(sys.argv[1]).glob("claim-*")):
    claim = tomllib.loads((folder / "claim.toml").read_text())
    verdict = (folder / "verdict.txt").read_text().split(" size: ")[1].split(",")[0]
    found = []
    with open(folder / "tests.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["target"] == "all" and row["role"] != "premise":
                role = "control: " if row["role"] == "control" else ""
                found.append(f"{role}{row['test']}, {row['expected']}: **{number(row)}**".replace("|", "/"))
    print(f"| {claim['claim']} | {claim['statement']} | {verdict} | {'; '.join(found)} |")
