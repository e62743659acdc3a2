"""Metrics of arrays of predictions and labels. Where one is not defined (the correlation of a constant) it is 0.

Equal to scikit-learn's and SciPy's metrics of these names. For two classes Matthews' coefficient is a correlation, and
f1 is of class 1. macro_f1 is the mean of every class's f1, so that rare classes count as much as common ones.
"""
import math

import numpy as np


def accuracy(predictions, labels):
    return float((predictions == labels).mean())


def f1(predictions, labels):
    positives = int(predictions.sum() + labels.sum())
    return 2 * int((predictions * labels).sum()) / positives if positives else 0.0


def macro_f1(predictions, labels):
    classes = np.union1d(predictions, labels)
    return float(np.mean([f1(predictions == i, labels == i) for i in classes]))


def correlation(x, y):
    if x.max() == x.min() or y.max() == y.min() or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return 0.0  # constant, or a diverged run's NaN
    x = x - x.mean(dtype=np.float64)
    y = y - y.mean(dtype=np.float64)
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def spearman(x, y):
    """The correlation of ranks; equal values share their mean rank."""
    ranks = []
    for values in (x, y):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum() - (counts - 1) / 2)[inverse])
    return correlation(*ranks)


METRICS = {"accuracy": accuracy, "matthews": correlation, "f1": f1, "macro_f1": macro_f1, "pearson": correlation,
           "spearman": spearman}


def metrics_of(task):
    """Names of the metrics that a task has."""
    if task.kind == "regression":
        return ["pearson", "spearman"]
    n = len(task.classes)  # none on multiple choice
    return ["accuracy", *(["matthews", "f1"] if n == 2 else ["macro_f1"] if n else [])]


def score(metric, predictions, labels):
    """The value of one of METRICS, from lists."""
    return METRICS[metric](np.array(predictions), np.array(labels))


def summarise(task, examples, predictions):
    """{metric: value}. Where the examples are of several sets, first the means over the sets, then each set's."""
    by_set = {}
    for name in sorted({example.subset for example in examples}):
        chosen = [i for i, example in enumerate(examples) if example.subset == name]
        part = {kind: [values[i] for i in chosen] for kind, values in predictions.items()}
        labels = [1 if "failed" in part else examples[i].label for i in chosen]
        names = sorted(metrics_of(task), key=lambda metric: metric != task.metric)  # the main one first
        values = {metric: score(metric, part["predicted"], labels) for metric in names}
        if "per_byte" in part:
            values["accuracy_norm"] = score("accuracy", part["per_byte"], labels)
        if "failed" in part:
            values["failed_extractions"] = sum(part["failed"]) / len(chosen)
        by_set[name] = values
    if len(by_set) == 1:
        return values
    means = {metric: sum(values[metric] for values in by_set.values()) / len(by_set) for metric in values}
    return means | {f"{metric}_{name}": value for name, values in by_set.items() for metric, value in values.items()}
