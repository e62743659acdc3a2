"""Metrics: {name: value}, the main one first. What is not defined, such as the correlation of a constant, counts as 0.

    classification    accuracy, matthews (the correlation, for any number of classes), f1 (of class 1, if all are 0 or 1)
    regression        pearson, spearman
They equal scikit-learn's and SciPy's of these names.
"""
import math

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
