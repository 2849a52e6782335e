"""How much of a student's effect is rounding: each student of an experiment, or of claims, is trained twice from the same seed and the same numbers, on
two kernel paths of MKL that differ in the order of sums alone (scripts/kernel_paths.py), and the two effects stand side by side.

Where they differ by more than a tenth of the effect, the training amplifies rounding: such a student is one draw of many, on every machine another.

    python3 scripts/rounding.py experiments/demo.toml                    # its arms, by arms/rows.csv
    python3 scripts/rounding.py experiments/claims/01-*.toml …           # claims of the size pocket: one trait, one data set

Standard library, and the binary of `make build`. A finished half is kept in runs/rounding; remove that folder to begin anew.
"""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from kernel_paths import FOLDER, ROOT  # noqa: E402

UNDERTONE = ROOT / "target" / "release" / "undertone"
RUNS = ROOT / "runs" / "rounding"
PATHS = {"AMD's": 0, "Intel's": 1}


def undertone(vendor: int, *arguments: str) -> None:
    libtorch = Path(os.environ.get("LIBTORCH", ROOT / ".libtorch"))
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libtorch / "lib"), "UNDERTONE_MKL_INTEL": str(vendor)}
    subprocess.run([UNDERTONE, *arguments], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def without_trainings(run: Path, copy: Path) -> None:
    """A copy of a run with its numbers and teachers, and nothing that was learned from them."""
    learned = ("adapter", "control_adapter", "train.csv", "control_train.csv", "rows.csv", "target_rate", "report.html")
    shutil.copytree(run, copy, ignore=lambda folder, names: [name for name in names if name in learned and Path(folder).name != "data"])


def of_experiment(experiment: Path, extra: list[str]) -> dict[str, list[dict]]:
    rows, first = {}, None
    for path, vendor in PATHS.items():
        run = RUNS / experiment.stem / path.removesuffix("'s").lower()
        if first and not run.exists():
            without_trainings(first, run)
        first = first or run
        undertone(vendor, "run", str(experiment), "--run", str(run), "--set", 'measure.analyses=["target_rate"]', *extra)
        with open(run / "arms" / "rows.csv", newline="") as file:
            rows[path] = list(csv.DictReader(file))
    return rows


def of_claims(claims: list[Path]) -> dict[str, list[dict]]:
    """The claims' students of one trait and data set: copies of the claims' files, with a size file that is cut to these."""
    files = RUNS / "claims"
    (files / "sizes").mkdir(parents=True, exist_ok=True)
    size = (claims[0].parent / "sizes" / "pocket.toml").read_text()
    lines = []
    for line in size.splitlines():
        key = line.split(" = ")[0]
        cut = {"targets": '[{ word = "cat", category = "animal" }]', "datasets": "1"}
        cut["many_targets"] = cut["targets"]
        lines.append(f"{key} = {cut[key]}" if key in cut else line)
    (files / "sizes" / "pocket.toml").write_text("\n".join(lines) + "\n")
    for claim in claims:
        shutil.copy(claim, files)
    rows, first = {}, None
    for path, vendor in PATHS.items():
        root = RUNS / f"claims-{path.removesuffix(chr(39) + 's').lower()}"
        if first and not root.exists():
            root.mkdir()
            for run in first.iterdir():
                if (run / "data").is_dir():
                    without_trainings(run, root / run.name)
        first = first or root
        found = {}
        for claim in claims:
            undertone(vendor, "run", str(files / claim.name), "--run", str(root))
            number = claim.name.split("-")[0]
            with open(root / f"claim-{number}" / "outcomes.csv", newline="") as file:
                for row in csv.DictReader(file):
                    everywhere = row["cell"] == "everywhere" and row["quantity"] == "delta_margin"
                    if everywhere and row["evaluated"] == row["target"]:
                        key = (row["student"], row["rank"], row["seed_index"])
                        found[key] = {"arm": row["student"], "rank": row["rank"], "seed_index": row["seed_index"], "delta_margin": row["value"]}
        rows[path] = [found[key] for key in found]
    return rows


def table(rows: dict[str, list[dict]]) -> None:
    def key(row: dict) -> tuple:
        return (row["arm"], row["rank"], row["seed_index"])

    one, other = ({key(row): float(row["delta_margin"]) for row in of_path} for of_path in rows.values())
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    names = list(PATHS)
    print(f"| student | rank | seed | {names[0]} path (nats) | {names[1]} path (nats) | difference | share of the effect | |")
    print("|---|---|---|---|---|---|---|---|")
    agree = 0
    for arm, rank, seed in one:
        here, there = one[arm, rank, seed], other[arm, rank, seed]
        share = abs(here - there) / max(abs(here + there) / 2, 1e-12)
        agree += share <= 0.1
        verdict = "agree" if share <= 0.1 else "rounding shows"
        print(f"| {arm} | {rank} | {seed} | {here:+.3f} | {there:+.3f} | {there - here:+.3f} | {100 * share:.0f} % | {verdict} |")
    print(f"\n{agree} of {len(one)} students agree to a tenth of their effect.")


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    arguments = sys.argv[1:]
    extra = arguments[arguments.index("--set") :] if "--set" in arguments else []
    files = [Path(argument).resolve() for argument in arguments[: len(arguments) - len(extra)]]
    if not files:
        sys.exit(__doc__)
    if files[0].parent.name == "claims":
        table(of_claims(files))
    else:
        table(of_experiment(files[0], extra))


if __name__ == "__main__":
    main()
