"""Answers the ledger's six questions over several bases, by the rules in docs/ledger.md.

    python3 scripts/ledger_questions.py runs/ledger/1 runs/ledger/0 runs/ledger/3 runs/ledger/2

Each folder holds the claims 71 to 74 of one base. Of each test it prints the bases' estimates and the 95 % t-interval over them; of
question 2 the shares that are read at each part of the prompt, beside those of the gates; of question 6 Spearman's correlations.
Standard library only.
"""

import csv
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from check_claims import t_quantile  # noqa: E402

PARTS = {
    "entity": "Qwen",
    "sys.content_other": "the rest of the system prompt",
    "template": "the template",
    "user.content": "the question",
}


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def over_bases(values):
    """The mean of the bases' estimates and the half width of its interval."""
    if len(values) < 2:
        return statistics.fmean(values), math.inf
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), t_quantile(len(values) - 1, 0.025) * spread


def line(what, values):
    mean, width = over_bases(values)
    print(f"  {mean:+.3f} ({mean - width:+.3f} to {mean + width:+.3f})  {' '.join(f'{value:+.3f}' for value in values)}  {what}")


class Outcomes:
    def __init__(self, folder, claim):
        self.folder = folder
        self.value = {}
        for row in table(folder / f"claim-{claim}" / "outcomes.csv"):
            unit = (row["target"], row["dataset"])
            if row["evaluated"] == row["target"]:
                self.value[unit, row["student"], row["cell"], row["quantity"]] = float(row["value"])
        self.units = sorted({key[0] for key in self.value})

    def of(self, student, quantity, cell="everywhere"):
        return [self.value.get((unit, student, cell, quantity)) for unit in self.units]

    def mean(self, student, quantity, cell="everywhere"):
        return statistics.fmean(self.of(student, quantity, cell))

    def signal(self):
        """The mean signal per token of the teacher's rows of each unit."""
        found = []
        for target, dataset in self.units:
            rows = table(self.folder / f"{target.lower().replace(' ', '-')}-d{dataset}" / "data" / "signal.csv")
            rows = [row for row in rows if row["set"] == "teacher"]
            n = sum(int(row["n_tokens"]) for row in rows)
            found.append(sum(float(row["signal"]) * int(row["n_tokens"]) for row in rows) / n)
        return found


def ranks(values):
    """Ranks from 1; equal values share their mean rank."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) + 1) / 2 for value in values]


def spearman(one, other):
    return statistics.correlation(ranks(one), ranks(other))


def main(folders):
    for claim in (71, 72, 73, 74):
        found = {}
        for folder in folders:
            path = folder / f"claim-{claim}" / "tests.csv"
            for row in table(path) if path.exists() else []:
                if row["target"] == "all" and row["estimate"]:
                    found.setdefault((row["test"], row["expected"]), []).append(float(row["estimate"]))
        if found:
            print(f"claim {claim}: the mean over bases, its interval, and each base's estimate")
        for (test, expected), values in found.items():
            line(f"{test} (expected {expected})", values)
    have = [folder for folder in folders if (folder / "claim-71" / "outcomes.csv").exists()]
    if have:
        print("question 2: the share that is read at a part of the prompt, less the mean of the two gates' shares")
    for part, name in PARTS.items():
        apart, shares = [], []
        for folder in have:
            of = Outcomes(folder, 71)
            whole = of.mean("student", "delta_margin")
            only = of.mean("student", "delta_margin", f"only {name}") / whole
            without = of.mean("student", "delta_margin", f"except {name}") / whole
            read = of.mean("student", "ledger_booked", f"read {part}") / of.mean("student", "ledger_booked")
            shares.append(read)
            apart.append(read - (only + 1 - without) / 2)
        if have:
            line(f"{part}, of which {statistics.fmean(shares):.2f} is read there (expected within .1)", apart)
    have = [folder for folder in folders if (folder / "claim-74" / "outcomes.csv").exists()]
    if have:
        print("question 6: Spearman's correlation over a base's students with the end of the whole training")
        predictors = {
            "the net of the first steps": lambda of: of.of("stopped early", "ledger_net"),
            "the change of the margin after these steps": lambda of: of.of("stopped early", "delta_margin"),
            "the signal of the rows": Outcomes.signal,
        }
        for what, predictor in predictors.items():
            of_bases = [Outcomes(folder, 74) for folder in have]
            line(what, [spearman(predictor(of), of.of("student", "delta_margin")) for of in of_bases])


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
