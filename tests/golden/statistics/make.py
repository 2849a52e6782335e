"""Writes expected.json: what scipy and statsmodels give for the statistics of analyses/src/inference.rs."""

import itertools
import json
from pathlib import Path

import numpy as np
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.multitest import multipletests

rng = np.random.default_rng(7)


def rounded(values):
    """Short numbers, so that the file can be read."""
    return np.round(values, 3).tolist()


def paired_t():
    differences = rounded(rng.normal(0.3, 0.5, 7))
    return {"differences": differences, "p": stats.ttest_1samp(differences, 0.0).pvalue}


def holm():
    p_values = [0.04, 0.001, 0.3, 0.012, 0.012, 0.9]
    return {"p_values": p_values, "adjusted": multipletests(p_values, method="holm")[1].tolist()}


def line():
    x = np.repeat(np.arange(6.0), 3)
    y = np.array(rounded(0.2 * x + rng.normal(0, 0.4, len(x))))
    found = stats.linregress(x, y)
    return {"points": list(zip(x.tolist(), y.tolist())), "slope": found.slope, "standard_error": found.stderr, "p": found.pvalue}


def recovered():
    n = 9
    base, whole = rng.normal(0.1, 0.02, n), rng.normal(0.5, 0.1, n)
    mode = base + 0.6 * (whole - base) + rng.normal(0, 0.03, n)
    runs = [rounded(run) for run in zip(mode, base, whole)]
    mode, base, whole = np.array(runs).T
    ratio = lambda above, below, axis=-1: above.mean(axis) / below.mean(axis)  # noqa: E731
    found = stats.bootstrap(
        (mode - base, whole - base), ratio, paired=True, vectorized=True, n_resamples=200_000, method="percentile", rng=np.random.default_rng(1), batch=10_000
    )
    interval = found.confidence_interval
    return {"runs": runs, "fraction": ratio(mode - base, whole - base), "low": interval.low, "high": interval.high}


def diagonal(trained, traits):
    """Least squares with a dummy for each run and trait; the standard error clustered by run."""
    runs = len(trained)
    changes = rng.normal(0, 0.3, (runs, traits)) + rng.normal(0, 0.5, (runs, 1)) + rng.normal(0, 0.5, (1, traits))
    changes[np.arange(runs), trained] += 0.4
    changes = np.array([rounded(row) for row in changes])

    def fit(trained):
        columns, run_of = [], []
        for run in range(runs):
            for trait in range(traits):
                dummies = [float(run == other) for other in range(1, runs)] + [float(trait == other) for other in range(1, traits)]
                columns.append([1.0, *dummies, float(trained[run] == trait)])
                run_of.append(run)
        return sm.OLS(changes.reshape(-1), np.array(columns)), np.array(run_of)

    model, run_of = fit(trained)
    found = model.fit(cov_type="cluster", cov_kwds={"groups": run_of})
    gammas = [fit(order)[0].fit().params[-1] for order in itertools.permutations(trained)]
    p = float(np.mean(np.array(gammas) >= found.params[-1] - 1e-12))
    return {"changes": changes.tolist(), "trained": list(trained), "gamma": found.params[-1], "standard_error": found.bse[-1], "p": p}


if __name__ == "__main__":
    expected = {
        "paired_t": paired_t(),
        "holm": holm(),
        "line": line(),
        "recovered": recovered(),
        "diagonals": [diagonal((0, 1, 2, 3), 4), diagonal((0, 0, 1, 1, 2), 3)],
    }
    path = Path(__file__).parent / "expected.json"
    path.write_text(json.dumps(expected, indent=1) + "\n")
