"""Metrics: worked by hand, and equal to scikit-learn's and SciPy's."""
import math
import numpy as np
import pytest

from data.batches import Example
from data.metrics import score, summarise
from data.tasks import Task


@pytest.mark.parametrize("predictions, labels, accuracy, matthews, f1", [
    ([1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1], 4 / 6, 3 / 9, 4 / 6), ([1, 1, 1, 1], [1, 1, 1, 0], 3 / 4, 0, 6 / 7),
    ([0, 0, 0], [0, 0, 0], 1, 0, 0), ([1, 0], [0, 1], 0, -1, 0)])
def test_classification_by_hand(predictions, labels, accuracy, matthews, f1):
    values = [score(metric, predictions, labels) for metric in ("accuracy", "matthews", "f1")]
    assert values == pytest.approx([accuracy, matthews, f1]) and all(type(value) in (int, float) for value in values)


def test_classification_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 50)
    predictions = np.where(draw.random(50) < 0.6, labels, draw.integers(0, 2, 50))
    assert score("matthews", predictions, labels) == pytest.approx(sklearn.matthews_corrcoef(labels, predictions))
    assert score("f1", predictions, labels) == pytest.approx(sklearn.f1_score(labels, predictions))
    labels, predictions = labels + 3 * draw.integers(0, 2, 50), predictions + 3 * draw.integers(0, 2, 50)
    for n in (50, 5):  # of five not every class occurs
        expected = sklearn.f1_score(labels[:n], predictions[:n], average="macro")
        assert score("macro_f1", predictions[:n], labels[:n]) == pytest.approx(expected)


def test_correlations_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 6, 40) / 2, draw.normal(size=40)  # of which x has equal values
    assert score("pearson", x, y) == pytest.approx(stats.pearsonr(x, y)[0])
    assert score("spearman", x, y) == pytest.approx(stats.spearmanr(x, y)[0])


@pytest.mark.parametrize("bad", [[0.1] * 4, [math.nan, 1, 2, 3], [math.inf, 1, 2, 3]])
def test_the_correlation_of_a_constant_or_a_diverged_run_is_zero(bad):
    assert score("pearson", bad, [1, 2, 3, 4]) == 0


def test_several_sets_are_scored_apart_and_averaged_and_the_main_metric_comes_first():
    examples = [Example([], label, subset=name) for name, label in (("a", 0), ("a", 1), ("b", 1))]
    values = summarise(Task("t", "classification", [0, 1], "f1", [], []), examples, {"predicted": [0, 0, 1]})
    assert values["accuracy_a"] == 0.5 and values["accuracy_b"] == 1.0 and values["accuracy"] == 0.75
    assert list(values)[:3] == ["f1", "accuracy", "matthews"]


def test_an_answer_that_was_not_found_counts_as_failed():
    task, examples = Task("t", "multiple_choice", [], "accuracy", [], []), [Example([], 0), Example([], 0)]
    values = summarise(task, examples, {"predicted": [1, 0], "failed": [0, 1]})
    assert values == {"accuracy": 0.5, "failed_extractions": 0.5}
