"""Metrics: worked by hand, and equal to scikit-learn's and SciPy's."""
import math
from types import SimpleNamespace

import numpy as np
import pytest

from data.batches import Example
from data.metrics import METRICS, score, summarise

BY_HAND = [  # predictions, labels, accuracy, matthews, f1
    ([1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1], 4 / 6, 3 / 9, 4 / 6),
    ([1, 1, 1, 1], [1, 1, 1, 0], 3 / 4, 0, 6 / 7),
    ([0, 0, 0], [0, 0, 0], 1, 0, 0),
    ([1, 0], [0, 1], 0, -1, 0),
    ([0, 1, 2, 2], [0, 1, 2, 1], 3 / 4, 7 / 10, None),
]


@pytest.mark.parametrize("predictions, labels, accuracy, matthews, f1", BY_HAND)
def test_classification_by_hand(predictions, labels, accuracy, matthews, f1):
    expected = {"accuracy": accuracy, "matthews": matthews} | ({} if f1 is None else {"f1": f1})
    assert score("accuracy", predictions, labels) == pytest.approx(expected)


def test_correlations_by_hand():
    # deviations -1.5 -.5 .5 1.5 and -2 -1 0 3
    expected = {"pearson": 8 / math.sqrt(5 * 14), "spearman": 1}
    assert score("pearson", [1, 2, 3, 4], [0, 1, 2, 5]) == pytest.approx(expected)


def test_equal_values_share_their_mean_rank():
    assert score("pearson", [1, 1, 9], [0, 2, 4])["spearman"] == pytest.approx(math.sqrt(3) / 2)


@pytest.mark.parametrize("metric", METRICS)
def test_the_main_metric_comes_first_and_values_are_plain_numbers(metric):
    values = score(metric, [1, 0, 1, 1], [1, 0, 0, 1])
    assert next(iter(values)) == metric
    assert all(type(value) is float for value in values.values())


def test_classification_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    for classes in (2, 2, 3, 4):
        labels = draw.integers(0, classes, 50)
        predictions = np.where(draw.random(50) < 0.6, labels, draw.integers(0, classes, 50))
        expected = {"accuracy": sklearn.accuracy_score(labels, predictions),
                    "matthews": sklearn.matthews_corrcoef(labels, predictions)}
        if classes == 2:
            expected["f1"] = sklearn.f1_score(labels, predictions)
        assert score("matthews", predictions.tolist(), labels.tolist()) == pytest.approx(expected)


def test_correlations_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    for _ in range(10):
        x, y = draw.integers(0, 6, 40) / 2, draw.normal(size=40)
        expected = {"pearson": stats.pearsonr(x, y)[0], "spearman": stats.spearmanr(x, y)[0]}
        assert score("pearson", x.tolist(), y.tolist()) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [[2.0] * 4, [0.1] * 4, [math.nan, 1, 2, 3], [math.inf, 1, 2, 3]])
def test_the_correlation_of_a_constant_or_a_diverged_run_is_zero(bad):
    assert score("pearson", bad, [1, 2, 3, 4])["pearson"] == 0


def test_several_sets_are_scored_apart_and_averaged():
    examples = [Example([], label, set=name) for name, label in (("a", 0), ("a", 1), ("b", 1))]
    task = SimpleNamespace(metric="accuracy", kind="classification")
    values = summarise(task, examples, {"main": [0, 0, 1]})
    assert values["accuracy_a"] == 0.5 and values["accuracy_b"] == 1.0 and values["accuracy"] == 0.75


def test_an_answer_that_was_not_found_counts_as_failed():
    examples = [Example([], 0), Example([], 0)]
    task = SimpleNamespace(metric="accuracy", kind="multiple_choice")
    assert summarise(task, examples, {"main": [1, 0], "failed": [0, 1]}) == {"accuracy": 0.5, "failed_extractions": 0.5}
