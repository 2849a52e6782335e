"""Recomputes the tests of claims from the tables that a run left, by other formulas than the program's, and compares.

    python3 tests/check_claims.py runs/claims-pocket          # every claim-NN in the folder
    python3 tests/check_claims.py tests/golden/claims
    python3 tests/check_claims.py runs/null --null 3          # claim 90: how often do 3 data sets at a time call an effect?

Where the runs lie beside the claims, what outcomes.csv says of a training is read anew from its train.csv. Standard library only.
"""

import argparse
import csv
import functools
import itertools
import math
import random
import sys
import tomllib
from pathlib import Path

LEVEL = 0.95


def t_tail(t, df):
    """P(T > t) of Student's t, by Simpson's rule on the density over the angle t = sqrt(df) tan(a)."""
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    a, b, n = math.atan(t / math.sqrt(df)), math.pi / 2, 20000
    h = (b - a) / n
    f = lambda x: max(math.cos(x), 0.0) ** (df - 1)
    total = f(a) + f(b) + sum((4 if i % 2 else 2) * f(a + i * h) for i in range(1, n))
    return constant * total * h / 3


@functools.cache
def t_quantile(df, tail):
    low, high = 0.0, 1e3
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > tail else (low, middle)
    return (low + high) / 2


def over_datasets(values):
    n = len(values)
    centre = sum(values) / n
    if n < 2:
        return dict(estimate=centre)
    spread = math.sqrt(sum((v - centre) ** 2 for v in values) / (n - 1) / n)
    quantile = t_quantile(n - 1, (1 - LEVEL) / 2)
    found = dict(estimate=centre, low=centre - quantile * spread, high=centre + quantile * spread)
    if spread > 0:
        found["p"] = 2 * t_tail(abs(centre / spread), n - 1)
    if n <= 12:
        flips = [abs(sum(s * v for s, v in zip(signs, values))) for signs in itertools.product((1, -1), repeat=n)]
        found["p_sign_flip"] = sum(f >= abs(sum(values)) - 1e-12 * max(map(abs, values)) for f in flips) / len(flips)
    return found


class Table:
    def __init__(self, rows, words):
        self.rows, self.words = rows, words
        self.datasets = sorted({r["dataset"] for r in rows})

    def pick(self, of, dataset, word, evaluated=None):
        return [r for r in self.rows
                if r["student"] == of["student"] and r["quantity"] == of["quantity"] and r["dataset"] == dataset
                and r["target"] == word and r["evaluated"] == (evaluated or word)
                and (of["cell"] == "*" or r["cell"] == of["cell"]) and (of["rank"] is None or r["rank"] == of["rank"])]

    def by_dataset(self, of, beside=None):
        """Means over traits and seeds; `beside` is a number of the same runs that this one is set against."""
        mean = lambda values: sum(values) / len(values)
        # A share of the teacher's gain is told in no student of a run in which that gain is not clear of zero.
        gains = lambda d, w: "fit" not in {one["quantity"] for one in (of, beside or of)} or any(
            r["quantity"] == "fit" and r["dataset"] == d and r["target"] == w for r in self.rows)
        by_trait = [[mean([r["value"] for r in self.pick(of, d, w)]) for w in self.words if gains(d, w)] for d in self.datasets]
        return [mean(values) for values in by_trait if values]

    def series(self, of, over):
        """Per data set, (x, y) by rank and cell: means over traits and seeds."""
        found = []
        for d in self.datasets:
            places = {}
            for w in self.words:
                for r in self.pick(of, d, w):
                    places.setdefault((r["rank"], r["cell"]), []).append(r["value"])
            points = []
            for (rank, cell), ys in places.items():
                if over == "log2_rank":
                    x = math.log2(rank)
                else:
                    at = dict(of, quantity=over, rank=rank, cell=cell)
                    xs = [r["value"] for w in self.words for r in self.pick(at, d, w) if r["rank"] == rank]
                    x = sum(xs) / len(xs)
                points.append((x, sum(ys) / len(ys)))
            found.append(points)
        return found


def slope(points):
    """By pairs of points: the mean of their slopes, weighted by the squares of their distances."""
    pairs = list(itertools.combinations(points, 2))
    below = sum((a[0] - b[0]) ** 2 for a, b in pairs)
    return sum((a[0] - b[0]) * (a[1] - b[1]) for a, b in pairs) / below if below > 0 else None


def peak(points):
    places = {}
    for x, y in points:
        places.setdefault(x, []).append(y)
    return max(sorted(places), key=lambda x: sum(places[x]) / len(places[x]))


def of(given):
    given = given or {}
    return dict(student=given.get("student", "student"), rank=given.get("rank"), cell=given.get("cell", "everywhere"),
                quantity=given.get("quantity", "delta_margin"))


def recompute(test, table):
    """Numbers of a test, and by how much each may differ (where it is drawn by chance)."""
    kind, one = test["kind"], of(test.get("of"))
    if one["quantity"] == "injected_other_delta_margin" and len({r["target"] for r in table.rows}) < 2:
        return {}, {}
    if kind == "mean":
        return over_datasets(table.by_dataset(one)), {}
    if kind == "difference":
        minus = of(test["minus"])
        pairs = zip(table.by_dataset(one, minus), table.by_dataset(minus, one))
        return over_datasets([a - b for a, b in pairs]), {}
    if kind == "recovered":
        everything = of(test["all"])
        part, whole = table.by_dataset(one, everything), table.by_dataset(everything, one)
        n = len(part)
        if n < 2:
            return {}, {}
        centre = sum(whole) / n
        error = math.sqrt(sum((v - centre) ** 2 for v in whole) / (n - 1) / n)
        if abs(centre) <= 3 * error:
            return {}, {}
        # Fieller's interval, searched for: where the mean of part - r * whole is as many standard errors from zero as Student's t says.
        quantile = t_quantile(n - 1, (1 - LEVEL) / 2)
        ratio = sum(part) / sum(whole)

        def beyond(r):
            apart = [a - r * b for a, b in zip(part, whole)]
            middle = sum(apart) / n
            return abs(middle) - quantile * math.sqrt(sum((v - middle) ** 2 for v in apart) / (n - 1) / n)

        def end(sign):
            step = 1e-3
            while beyond(ratio + sign * step) < 0:
                step *= 2
                if step > 1e9:
                    return None
            low, high = 0.0, step
            for _ in range(200):
                middle = (low + high) / 2
                low, high = (middle, high) if beyond(ratio + sign * middle) < 0 else (low, middle)
            return ratio + sign * high

        low, high = end(-1), end(1)
        return (dict(estimate=ratio) if low is None or high is None else dict(estimate=ratio, low=low, high=high)), {}
    if kind in ("slope", "rise", "fall"):
        series = table.series(one, test.get("over", "log2_rank"))
        if kind != "slope":
            # At an end of the ranks there is one side alone: then the two ranks at that end. Where the peak is, the other data sets say.
            places = sorted({x for points in series for x, _ in points})
            sides = []
            for at, points in enumerate(series):
                top = peak([p for other, theirs in enumerate(series) if other != at or len(series) == 1 for p in theirs])
                low, high = max(top, places[1]), min(top, places[-2])
                sides.append([p for p in points if (p[0] <= low if kind == "rise" else p[0] >= high)])
            series = sides
        slopes = [slope(points) for points in series]
        return over_datasets(slopes), {}
    if kind in ("diagonal", "peak_spread") and len(table.words) < 2:
        return {}, {}
    if kind == "diagonal":
        gammas = []
        for d in table.datasets:
            # Of a full matrix with one run a trait: the mean diagonal minus the mean of the rest, without rows' and columns' own.
            k = len(table.words)
            matrix = [[table.pick(one, d, a, b)[0]["value"] for b in table.words] for a in table.words]
            diagonal = sum(matrix[i][i] for i in range(k)) / k
            rest = sum(matrix[i][j] for i in range(k) for j in range(k) if i != j) / (k * (k - 1))
            gammas.append(diagonal - rest)
        found = over_datasets(gammas)
        found.pop("p", None)
        return found, {}
    if kind == "peak_spread":
        by_word = [Table(table.rows, [w]).series(one, "log2_rank") for w in table.words]
        spread = lambda sets: max(t := [peak([p for points in s for p in points]) for s in sets]) - min(t)
        found = spread(by_word)
        rng, hits, n = random.Random(2), 0, 4000
        for _ in range(n):
            drawn = [[] for _ in by_word]
            for d in range(len(table.datasets)):
                for at, source in enumerate(rng.sample(range(len(by_word)), len(by_word))):
                    drawn[at].append(by_word[source][d])
            hits += spread(drawn) >= found - 1e-9
        p = hits / n
        return dict(estimate=found, p=p), dict(p=6 * math.sqrt(max(p * (1 - p), 0.01) / n))
    raise SystemExit(f"unknown kind {kind}")


def outcome(test, row, found):
    sign, bound = (1, test["above"]) if "above" in test else (-1, test["below"])
    if test["kind"] == "peak_spread" and row["p"]:
        return "holds" if float(row["p"]) < 1 - LEVEL else "undecided"
    if "low" not in found:
        return "undecided"
    low, high = float(row["low"]), float(row["high"])
    near, far = (low, high) if sign > 0 else (-high, -low)
    return "holds" if near > sign * bound else "fails" if far < sign * bound else "undecided"


def read(path):
    rows = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            row.update(dataset=int(row["dataset"]), value=float(row["value"]), rank=int(row["rank"]) if row["rank"] else None)
            rows.append(row)
    return rows


def check_trainings(folder, claim, rows):
    """What the table says of trainings, from their logs."""
    own = f"claim-{claim['claim']:02}-" if claim.get("set") else ""
    logs = {"student": "train.csv", "control student": "control_train.csv"}
    n = 0
    for row in rows:
        if row["student"] not in logs or row["quantity"] not in ("n_targets", "loss_last", "delta_w_norm"):
            continue
        path = folder.parent / f"{own}{row['target'].lower()}-d{row['dataset']}" / logs[row["student"]]
        if not path.exists():
            continue
        with open(path, newline="") as file:
            steps = list(csv.DictReader(file))
        last = steps[-math.ceil(len(steps) / 4):]
        targets = lambda steps: sum(int(s["n_targets"]) for s in steps)
        expected = {
            "n_targets": targets(steps),
            "loss_last": sum(float(s["loss"]) * int(s["n_targets"]) for s in last) / targets(last),
            "delta_w_norm": float(steps[-1]["delta_w_norm"] or "nan"),
        }[row["quantity"]]
        assert abs(expected - row["value"]) <= 1e-9 * max(1.0, abs(expected)), (path, row, expected)
        n += 1
    return n


def check_chosen(claim, rows):
    """That the students that a measurement picked out are those, and their lines that one's."""
    place = lambda row: (row["target"], row["dataset"], row["rank"], row["seed_index"])
    ranks = {student["name"]: student.get("ranks") for student in claim.get("students", [])}
    n = 0
    for chosen in claim.get("chosen", []):
        aim = of(chosen["nearest"]) if "nearest" in chosen else None
        quantity = chosen.get("lowest") or aim["quantity"]
        lines = {}
        for row in rows:
            if row["student"] == chosen["name"]:
                lines.setdefault(place(row), {})[row["cell"], row["evaluated"], row["quantity"]] = row["value"]
        assert lines, (chosen["name"], "has no lines")
        for (word, dataset, rank, seed), own in lines.items():
            goal = Table(rows, [word]).pick(aim, dataset, word)[0]["value"] if aim else -math.inf
            ranked = []
            for at, name in enumerate(chosen["of"]):
                if ranks.get(name) and int(rank) not in ranks[name]:
                    continue  # the claim does not train it at this rank
                theirs = {(r["cell"], r["evaluated"], r["quantity"]): r["value"] for r in rows
                          if r["student"] == name and place(r) == (word, dataset, rank, seed)}
                value = theirs["everywhere", word, quantity]
                ranked.append((value if not aim else abs(value - goal), at, theirs))
            _, at, theirs = min(ranked, key=lambda entry: entry[:2])
            assert own.pop(("everywhere", word, "chosen")) == at, (chosen["name"], word, dataset, rank)
            for key, value in own.items():
                assert theirs[key] == value, (chosen["name"], word, dataset, rank, key)
            n += 1 + len(own)
    return n


def check(folder):
    claim = tomllib.loads((folder / "claim.toml").read_text())
    rows = read(folder / "outcomes.csv")
    words = [t["word"] for t in claim["targets"]]
    with open(folder / "tests.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    tests = {t["name"]: t for t in claim["tests"]}
    n = check_trainings(folder, claim, rows) + check_chosen(claim, rows)
    for line in lines:
        test = tests[line["test"]]
        table = Table(rows, words if line["target"] == "all" else [line["target"]])
        found, slack = recompute(test, table)
        for name in ("estimate", "low", "high", "p", "p_sign_flip"):
            if name == "p" and test["kind"] == "diagonal":
                continue
            said = float(line[name]) if line[name] else None
            if name == "p_sign_flip" and len(table.datasets) > 12:
                continue
            if found.get(name) is None:
                assert said is None, (folder.name, line["test"], line["target"], name, said, "expected none")
                continue
            allowed = slack.get(name, 1e-7 * max(1.0, abs(found[name])))
            assert said is not None and abs(said - found[name]) <= allowed, \
                (folder.name, line["test"], line["target"], name, said, found[name], allowed)
            n += 1
        assert line["outcome"] == outcome(test, line, found), (folder.name, line["test"], line["outcome"], outcome(test, line, found))
        n += 1
    print(f"{folder.name}: {n} numbers and outcomes agree")
    return n


def null(folder, size):
    """Claim 90's data sets in groups: how often is an effect called at the stated level?"""
    claim = tomllib.loads((folder / "claim.toml").read_text())
    table = Table(read(folder / "outcomes.csv"), [t["word"] for t in claim["targets"]])
    for test in claim["tests"]:
        one, other = table.by_dataset(of(test["of"])), table.by_dataset(of(test["minus"]))
        values = [a - b for a, b in zip(one, other)]
        groups = [values[at:at + size] for at in range(0, len(values) - size + 1, size)]
        found = [over_datasets(group) for group in groups]
        above, either = sum(f["low"] > 0 for f in found), sum(f["low"] > 0 or f["high"] < 0 for f in found)
        n = len(groups)
        print(f"{test['name']}: of {n} groups of {size} data sets {above} are called an effect above 0, {either} one in either direction")
        assert above <= 0.05 * n, f"{above} of {n} nulls were called an effect"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--null", type=int, metavar="SIZE")
    args = parser.parse_args()
    if args.null:
        null(args.folder / "claim-90", args.null)
        sys.exit()
    claims = sorted(args.folder.glob("claim-*/outcomes.csv"))
    assert claims, f"{args.folder} holds no claim"
    total = sum(check(path.parent) for path in claims)
    print(f"{len(claims)} claims, {total} numbers and outcomes agree")
