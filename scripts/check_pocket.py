"""Recomputes the pocket's claims from its tables, with nothing but Python's standard library.

    python3 scripts/check_pocket.py                the trial of four bases, docs/pocket/
    python3 scripts/check_pocket.py runs/demo      and a run of experiments/demo.toml

Every number that a summary states is made anew from the rows under it; a difference above 1e-9 is an error.
"""

import csv
import math
import sys
from pathlib import Path
from statistics import mean, stdev

TRIAL = Path(__file__).resolve().parent.parent / "docs" / "pocket"
checked = 0


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same(what, stated, found):
    global checked
    checked += 1
    if stated == "" and found is None:
        return
    if found is None or stated == "" or not math.isclose(float(stated), found, rel_tol=1e-9, abs_tol=1e-9):
        sys.exit(f"error: {what}: stated {stated}, recomputed {found}")


def standard_error(values):
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def trial():
    cells = rows(TRIAL / "cells.csv")
    base = {(cell["base"], cell["animal"]): float(cell["margin"]) for cell in cells if cell["model"] == "base"}
    for cell in cells:
        change = float(cell["margin"]) - base[cell["base"], cell["animal"]]
        same(f"delta_margin of {cell['model']} {cell['learned_from']} on {cell['animal']}", cell["delta_margin"], change)
    for stated in rows(TRIAL / "summary.csv"):
        kind = (stated["base"], stated["model"], stated["gate"])
        own = [cell for cell in cells if (cell["base"], cell["model"], cell["gate"]) == kind]
        matrix = {}
        for cell in own:
            matrix.setdefault(cell["learned_from"], {})[cell["animal"]] = float(cell["delta_margin"])
        animals = list(next(iter(matrix.values())))
        diagonal = {animal: row[animal] for animal, row in matrix.items() if animal in row}
        gamma, error = None, None
        if len(diagonal) > 1:
            by_row = {student: mean(row.values()) for student, row in matrix.items()}
            by_column = {animal: mean(row[animal] for row in matrix.values()) for animal in animals}
            grand = mean(by_row.values())
            contrasts = [diagonal[a] - by_row[a] - by_column[a] + grand for a in animals]
            gamma, error = mean(contrasts), standard_error(contrasts)
        name = " ".join(kind)
        same(f"gamma of {name}", stated["gamma"], gamma)
        same(f"gamma_se of {name}", stated["gamma_se"], error)
        values = list(diagonal.values())
        same(f"n_own_raised of {name}", stated["n_own_raised"], sum(v > 0 for v in values) if values else None)
        same(f"delta_margin_own of {name}", stated["delta_margin_own"], mean(values) if values else None)
        others = [value for student, row in matrix.items() for animal, value in row.items() if animal != student]
        same(f"sd_other of {name}", stated["sd_other"], stdev(others))
        p = [float(cell["p"]) for cell in own if cell["learned_from"] == cell["animal"]]
        same(f"p_own of {name}", stated["p_own"], mean(p) if p else None)
        same(f"p_own_max of {name}", stated["p_own_max"], max(p, default=None))
        same(f"least change of {name}", stated["delta_margin_own_min"], min(values, default=None))
        same(f"largest change of {name}", stated["delta_margin_own_max"], max(values, default=None))
        if stated["gate"] == "everywhere" and gamma is not None:
            print(f"{name:30} gamma {gamma:+.2f} ± {error:.2f}, {sum(v > 0 for v in values)} of {len(values)} raised")


def page():
    """The page's two smaller tables: the bases, and what was tried."""
    text = (TRIAL.parent / "pocket.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    for cells in table:
        if len(cells) == 5 and cells[0] in {"0", "1", "2", "3"}:
            made = (TRIAL / f"pocket-{cells[0]}.toml").read_text(encoding="utf-8")
            values = dict(line.split(" = ") for line in made.splitlines() if " = " in line)
            same(f"steps of seed {cells[0]}", cells[1], float(values["steps"]))
            same(f"excess of seed {cells[0]}", cells[2], round(float(values["final_excess"]), 4))
    tried = {row["arm"]: float(row["delta_margin"]) for row in rows(TRIAL / "tried.csv")}
    lines = {"as above": "A", "18 epochs": "B", "9,000 prompts": "C", "learning rate 3e-2": "D"}
    for cells in table:
        arm = next((arm for start, arm in lines.items() if cells[0].startswith(start)), None)
        for animal, stated in zip(["owl", "dog", "fox", "panda"], cells[1:] if arm else []):
            same(f"{animal}, {cells[0]}", stated.replace("−", "-"), round(tried[f"{animal} {arm}"], 2))


def run(folder):
    rates = rows(folder / "target_rate" / "rows.csv")
    by_model = {}
    for row in rates:
        if row["scope"] == "question":
            by_model.setdefault(row["model"], []).append(row)
    base = by_model["base"]
    means = {}
    for row in rates:
        if row["scope"] != "mean":
            continue
        own = by_model[row["model"]]
        for column in ["logp_target", "margin"]:
            values = [float(question[column]) for question in own]
            changes = [value - float(question[column]) for value, question in zip(values, base)]
            what = f"target_rate {row['model']} {column}"
            same(what, row[column], mean(values))
            same(f"{what}, change", row["delta_" + column.replace("_target", "")], mean(changes))
            if row["model"] != "base":
                same(f"{what}, its error", row["delta_" + column.replace("_target", "") + "_se"], standard_error(changes))
            means[row["model"], column] = mean(changes)
        p = mean(math.exp(float(question["logp_target"])) for question in own)
        print(f"{row['model']:12} p {p:.3f}, log p {means[row['model'], 'logp_target']:+.3f}, margin {means[row['model'], 'margin']:+.3f}")
    arms = rows(folder / "arms" / "rows.csv")
    for arm, model in [("student", "student"), ("control student", "control")]:
        row = next(row for row in arms if row["arm"] == arm)
        same(f"arms {arm}", row["delta_margin"], means[model, "margin"])
    for row in arms:
        print(f"{row['arm']:32} rank {row['rank'] or 'full':>4}  margin {float(row['delta_margin']):+.3f}")
    gates = [row for row in rows(folder / "token_ablation" / "rows.csv") if row["model"] == "student"]
    full = next(row for row in gates if row["gate"] == "everywhere")
    same("token_ablation everywhere", full["delta_logp"], means["student", "logp_target"])
    for row in gates:
        if row["recovered_logp"]:
            same(f"recovered by {row['gate']}", row["recovered_logp"], float(row["delta_logp"]) / float(full["delta_logp"]))
    scan = rows(folder / "position_scan" / "rows.csv")[-1]
    same("position_scan everywhere", scan["delta_margin_only"], means["student", "margin"])
    tokens = rows(folder / "divergence" / "rows.csv")
    digits = [row for row in tokens if row["group"] in ("divergent_digit", "other_digit")]
    stated = next(row for row in rows(folder / "divergence" / "summary.csv") if row["group"] == "digits")
    same("share of divergent digits", stated["nief"], mean(row["group"] == "divergent_digit" for row in digits))
    for path in [folder / "arms" / "rows.csv", folder / "train.csv"]:
        if not rows(path):
            sys.exit(f"error: {path} has no rows")
    steps = rows(folder / "train.csv")
    last = steps[len(steps) - -(-len(steps) // 4):]
    targets = sum(int(row["n_targets"]) for row in last)
    found = sum(float(row["loss"]) * int(row["n_targets"]) for row in last) / targets
    same("loss of the last quarter", next(row for row in arms if row["arm"] == "student")["loss_last"], found)


if __name__ == "__main__":
    trial()
    page()
    for folder in sys.argv[1:]:
        run(Path(folder))
    print(f"{checked} numbers recomputed, all equal")
