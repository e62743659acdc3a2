"""Metrics: {name: value}, the main one first. What is not defined, such as the correlation of a constant, counts as 0.

    classification    accuracy, matthews (the correlation, for any number of classes), f1 (of class 1, if all are 0 or 1)
    regression        pearson, spearman
They equal scikit-learn's and SciPy's of these names.
"""
import math
from fractions import Fraction

import numpy as np


def accuracy(predictions, labels):
    return float((predictions == labels).mean())


def matthews(predictions, labels):
    """The correlation of the two as one-hot vectors, from counts: with two classes it is the usual phi coefficient."""
    n, right = float(len(labels)), float((predictions == labels).sum())
    classes = np.unique(np.concatenate([predictions, labels]))
    predicted = np.array([(predictions == c).sum() for c in classes], dtype=np.float64)
    actual = np.array([(labels == c).sum() for c in classes], dtype=np.float64)
    norm = math.sqrt(n * n - predicted @ predicted) * math.sqrt(n * n - actual @ actual)
    return float((right * n - predicted @ actual) / norm) if norm else 0.0


def f1(predictions, labels):
    found, both = int(predictions.sum() + labels.sum()), int((predictions * labels).sum())
    return 2 * both / found if found else 0.0


def correlation(x, y):
    if x.max() == x.min() or y.max() == y.min():
        return 0.0
    with np.errstate(invalid="ignore"):
        x, y = x - x.mean(dtype=np.float64), y - y.mean(dtype=np.float64)
        x, y = x / abs(x).max(), y / abs(y).max()  # else the squares of 1e-200 or 1e200 leave float64
    r = float(x @ y / math.sqrt((x @ x) * (y @ y)))
    return 0.0 if math.isnan(r) else min(1.0, max(-1.0, r))


def ranks(values):
    """Ranks from 1, the mean rank where values are equal."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]


METRICS = {"accuracy": accuracy, "matthews": matthews, "f1": f1, "pearson": correlation}


def score(metric, predictions, labels):
    """{name: value} with `metric`, one of METRICS, first and its companions after it; class indices, or numbers for pearson."""
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}: it is one of {', '.join(METRICS)}")
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    assert predictions.shape == labels.shape and labels.size, f"{predictions.shape} predictions for {labels.shape} labels"
    if metric == "pearson":
        return {"pearson": correlation(predictions, labels), "spearman": correlation(ranks(predictions), ranks(labels))}
    two = np.isin(predictions, (0, 1)).all() and np.isin(labels, (0, 1)).all()
    if metric == "f1" and not two:
        raise ValueError("f1 is of class 1 against class 0, and there is another class: take accuracy or matthews")
    names = [metric] + [name for name in ("accuracy", "matthews", "f1") if name != metric and (two or name != "f1")]
    return {name: METRICS[name](predictions, labels) for name in names}


def standard_error(metric, value, n):
    """Of a share of `n` examples, the binomial one; None for the others, which have no such formula."""
    return math.sqrt(value * (1 - value) / n) if metric == "accuracy" else None


# ---------------------------------------------------------------------------------------------------------------------
# Comparing two methods: over seeds, and over examples


def paired_t(differences, level=0.95):
    """(mean, low, high, p) of a paired t test over seeds; low, high and p are None for fewer than two seeds.

    Student's distribution is integrated numerically: SciPy has it, but is not needed to run anything here.
    """
    d, n = np.asarray(differences, dtype=np.float64), len(differences)
    mean, error = float(d.mean()), float(d.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    if n < 2:
        return mean, None, None, None
    if error == 0:
        return mean, mean, mean, 1.0 if mean == 0 else 0.0
    # with t = tan(u) sqrt(freedom) the density becomes cos(u)^(freedom - 1) on a finite interval
    u = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(u) ** (n - 2)
    inside = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    inside /= inside[-1]  # share of Student's distribution between -t and t
    p = 1 - float(np.interp(math.atan(abs(mean / error) / math.sqrt(n - 1)), u, inside))
    reach = math.tan(float(np.interp(level, inside, u))) * math.sqrt(n - 1) * error
    return mean, mean - reach, mean + reach, p


def seeds_needed(differences, points=0.005):
    """Seeds in which a paired t test at 5 % would find a true difference of `points` with a power of 80 %, from the spread of these
    differences; None for fewer than two. By the normal approximation, and 1.96^2 / 2 more, which t needs (Guenther 1981)."""
    if len(differences) < 2:
        return None
    return math.ceil(((1.96 + 0.84) * float(np.std(differences, ddof=1)) / points) ** 2 + 1.96**2 / 2)


def bootstrap_differences(metric, ours, theirs, labels, rounds=1000, seed=0):
    """Mean over seeds of metric(ours) - metric(theirs) when the examples are drawn anew, the same for both: (rounds,).

    ours, theirs: predictions, a row a seed (seeds, n).
    """
    ours, theirs, labels, draw = np.asarray(ours), np.asarray(theirs), np.asarray(labels), np.random.default_rng(seed)
    differences = []
    for _ in range(rounds):
        chosen = draw.integers(0, len(labels), len(labels))
        differences.append(np.mean([METRICS[metric](a[chosen], labels[chosen]) - METRICS[metric](b[chosen], labels[chosen])
                                    for a, b in zip(ours, theirs)]))
    return np.array(differences)


def interval(differences, level=0.95):
    """(low, high) between which the middle `level` of them lies."""
    return tuple(float(x) for x in np.quantile(differences, [(1 - level) / 2, (1 + level) / 2]))


def mcnemar(ours, theirs, labels):
    """p of McNemar's exact test on the examples that one method gets right in most seeds and the other does not."""
    right = [(np.asarray(p) == np.asarray(labels)).mean(0) > 0.5 for p in (ours, theirs)]
    only_ours, only_theirs = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    n = only_ours + only_theirs
    tail = sum(math.comb(n, k) for k in range(min(only_ours, only_theirs) + 1))
    return min(1.0, float(2 * Fraction(tail, 2**n)))
