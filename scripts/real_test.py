"""Decides the test of experiments/real/PROTOCOL.md from the tables of its data sets.

    python3 scripts/real_test.py runs/real/test/1 runs/real/test/2 …

Each folder holds claim 81 of one data set. For each kind of student: over the data sets, the mean over the traits of the change of
the student's own margin, less the mean change of the same margin in the two other traits' students, with its 95 % t-interval. Then
the same for each trait, and the change less the control student's. Standard library only.
"""

import statistics
import sys
from pathlib import Path

from ledger_questions import line, table

CONTROL = "control student"


def changes(folder):
    """The change of each trait's margin in each student: {(student, trait of its teacher, trait asked for): nats}."""
    rows = table(folder / "claim-81" / "outcomes.csv")
    rows = [row for row in rows if row["quantity"] == "delta_margin" and row["cell"] == "everywhere"]
    return {(row["student"], row["target"], row["evaluated"]): float(row["value"]) for row in rows}


def own_less_others(of, student, trait):
    """The change of a trait's margin in its own student, less the mean change of the same margin in the others'."""
    others = [value for (name, taught, asked), value in of.items() if name == student and asked == trait != taught]
    return of[student, trait, trait] - statistics.fmean(others)


def main(folders):
    sets = [changes(folder) for folder in folders]
    traits = sorted({trait for _, trait, _ in sets[0]})
    students = sorted({student for student, _, _ in sets[0]} - {CONTROL}, key=lambda name: (name != "student", name))
    print(f"{len(sets)} data sets of {', '.join(traits)}: the change of the margin in nats, its interval, and each data set")
    print("own trait, less the same trait in the others' students (of the student, this is the test)")
    for student in students:
        line(student, [statistics.fmean(own_less_others(of, student, trait) for trait in traits) for of in sets])
    for student in students:
        for trait in traits:
            line(f"{student}, {trait}", [own_less_others(of, student, trait) for of in sets])
    print("own trait, less the control student's")
    for student in students:
        of_set = lambda of: statistics.fmean(of[student, trait, trait] - of[CONTROL, trait, trait] for trait in traits)
        line(student, [of_set(of) for of in sets])


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
