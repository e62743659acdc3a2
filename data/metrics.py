"""Metrics as {name: value}, the main one first. Where one is not defined (the correlation of a constant) it is 0.

    classification    accuracy, matthews (for any number of classes), f1 (of class 1, where all labels are 0 or 1)
    regression        pearson, spearman
Equal to scikit-learn's and SciPy's metrics of these names.
"""
import math

import numpy as np


def accuracy(predictions, labels):
    return float((predictions == labels).mean())


def matthews(predictions, labels):
    """The correlation of predictions and labels as one-hot vectors; with two classes, the phi coefficient."""
    n = float(len(labels))
    correct = float((predictions == labels).sum())
    classes = np.unique(np.concatenate([predictions, labels]))
    predicted = np.array([(predictions == c).sum() for c in classes], dtype=np.float64)  # count of each class
    actual = np.array([(labels == c).sum() for c in classes], dtype=np.float64)
    norm = math.sqrt(n * n - predicted @ predicted) * math.sqrt(n * n - actual @ actual)
    return float((correct * n - predicted @ actual) / norm) if norm else 0.0


def f1(predictions, labels):
    positives = int(predictions.sum() + labels.sum())
    return 2 * int((predictions * labels).sum()) / positives if positives else 0.0


def correlation(x, y):
    if x.max() == x.min() or y.max() == y.min() or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return 0.0  # constant, or a diverged run's NaN
    x = x - x.mean(dtype=np.float64)
    y = y - y.mean(dtype=np.float64)
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def ranks(values):
    """Ranks from 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


METRICS = {"accuracy": accuracy, "matthews": matthews, "f1": f1, "pearson": correlation}


def score(metric, predictions, labels):
    """{name: value} of `metric`, one of METRICS, and its companions; classes, or numbers for pearson, as lists."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    assert predictions.shape == labels.shape and labels.size, f"{predictions.shape} predictions, {labels.shape} labels"
    if metric == "pearson":
        spearman = correlation(ranks(predictions), ranks(labels))
        return {"pearson": correlation(predictions, labels), "spearman": spearman}
    binary = np.isin(predictions, (0, 1)).all() and np.isin(labels, (0, 1)).all()
    names = [metric] + [name for name in ("accuracy", "matthews", "f1") if name != metric and (binary or name != "f1")]
    return {name: METRICS[name](predictions, labels) for name in names}


def summarise(task, examples, predictions):
    """{metric: value}. Where the examples are of several sets, first the means over the sets, then each set's."""
    by_set = {}
    for name in sorted({example.set for example in examples}):
        chosen = [i for i, example in enumerate(examples) if example.set == name]
        part = {kind: [values[i] for i in chosen] for kind, values in predictions.items()}
        labels = [1 if "failed" in part else examples[i].label for i in chosen]
        values = score(task.metric, part["main"], labels)
        if task.kind == "multiple_choice":
            values = {task.metric: values[task.metric]}
        if "per_byte" in part:
            values["accuracy_norm"] = score("accuracy", part["per_byte"], labels)["accuracy"]
        if "failed" in part:
            values["failed_extractions"] = sum(part["failed"]) / len(chosen)
        by_set[name] = values
    if len(by_set) == 1:
        return values
    means = {metric: sum(values[metric] for values in by_set.values()) / len(by_set) for metric in values}
    return means | {f"{metric}_{name}": value for name, values in by_set.items() for metric, value in values.items()}
