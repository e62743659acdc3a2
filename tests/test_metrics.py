"""Metrics: worked by hand, and equal to scikit-learn's and SciPy's on random arrays."""
import math

import numpy as np
import pytest

from data.metrics import METRICS, ranks, score, standard_error

#              predictions          labels              accuracy  matthews                 f1
BY_HAND = [([1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1], 4 / 6, (2 * 2 - 1 * 1) / 9, 4 / 6),
           ([1, 1, 1, 1], [1, 1, 1, 0], 3 / 4, 0, 6 / 7),
           ([0, 0, 0], [0, 0, 0], 1, 0, 0),
           ([1, 0], [0, 1], 0, -1, 0),
           ([0, 1, 2, 2], [0, 1, 2, 1], 3 / 4, (3 * 4 - 5) / math.sqrt((16 - 6) * (16 - 6)), None),
           ([0, 2, 2, 0], [1, 1, 0, 0], 1 / 4, (4 - 2 * 2) / 8, None)]


@pytest.mark.parametrize("predictions, labels, accuracy, matthews, f1", BY_HAND)
def test_classification_by_hand(predictions, labels, accuracy, matthews, f1):
    expected = {"accuracy": accuracy, "matthews": matthews} | ({} if f1 is None else {"f1": f1})
    assert score("accuracy", predictions, labels) == pytest.approx(expected)
    assert score("matthews", predictions, labels) == pytest.approx(expected)


def test_regression_by_hand():
    # deviations -1.5 -.5 .5 1.5 and -2 -1 0 3; ranks of the first are tied in the third case
    assert score("pearson", [1, 2, 3, 4], [0, 1, 2, 5]) == pytest.approx({"pearson": 8 / math.sqrt(5 * 14), "spearman": 1})
    assert score("pearson", [1.0, 2.0], [5.0, 3.0]) == pytest.approx({"pearson": -1, "spearman": -1})
    assert score("pearson", [1, 1, 9], [0, 2, 4])["spearman"] == pytest.approx(math.sqrt(3) / 2)
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]


@pytest.mark.parametrize("metric", METRICS)
def test_the_main_metric_comes_first_and_values_are_plain_numbers(metric):
    values = score(metric, [1, 0, 1, 1], [1, 0, 0, 1])
    assert next(iter(values)) == metric and all(type(value) is float for value in values.values())
    assert set(values) == ({"pearson", "spearman"} if metric == "pearson" else {"accuracy", "matthews", "f1"})


@pytest.mark.filterwarnings("ignore:A single label was found")
def test_classification_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    for trial in range(200):
        n, classes = int(draw.integers(1, 60)), int(draw.integers(1, 5))
        labels = draw.integers(0, classes, n)
        predictions = np.where(draw.random(n) < 0.6, labels, draw.integers(0, classes, n))
        expected = {"accuracy": sklearn.accuracy_score(labels, predictions),
                    "matthews": 0.0 if classes == 1 else sklearn.matthews_corrcoef(labels, predictions)}
        if max(labels.max(), predictions.max()) < 2:
            expected["f1"] = sklearn.f1_score(labels, predictions, labels=[1], average="macro", zero_division=0)
        assert score("matthews", predictions.tolist(), labels.tolist()) == pytest.approx(expected), trial


def test_counts_of_a_large_set_do_not_overflow():
    labels = np.arange(400_000) % 3 % 2
    values = score("matthews", labels, labels)
    assert values == {"matthews": pytest.approx(1), "accuracy": 1, "f1": 1}


def test_regression_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    for trial in range(200):
        n = int(draw.integers(3, 60))
        x, y = draw.integers(0, 6, n) / 2, draw.normal(size=n) * 10.0 ** draw.integers(-9, 9) + draw.integers(-3, 3)
        if x.min() < x.max():
            expected = {"pearson": stats.pearsonr(x, y)[0], "spearman": stats.spearmanr(x, y)[0]}
            assert score("pearson", x, y) == pytest.approx(expected, abs=1e-6), trial
            assert score("pearson", y, x.tolist()) == pytest.approx(expected, abs=1e-6), trial


def test_the_correlation_of_a_constant_counts_as_zero():
    for constant in (2.0, 0.1, 1234567.89, 1e30, 0):
        assert score("pearson", [constant] * 7, range(7)) == score("pearson", range(7), [constant] * 7) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("scale", [1e-200, 1e-20, 1, 1e30, 1e200])
def test_correlation_does_not_depend_on_scale(scale):
    assert score("pearson", [scale, 2 * scale, 4 * scale], [1, 2, 4]) == pytest.approx({"pearson": 1, "spearman": 1})


def test_values_are_finite_whatever_a_diverged_run_predicts():
    for bad in (math.nan, math.inf, -math.inf):
        values = score("pearson", [bad, 1.0, 2.0], [1, 2, 3])
        assert values["pearson"] == 0 and math.isfinite(values["spearman"])


def test_errors():
    with pytest.raises(ValueError, match="unknown metric 'mcc': it is one of accuracy, matthews, f1, pearson"):
        score("mcc", [1], [1])
    with pytest.raises(ValueError, match="f1 is of class 1 against class 0"):
        score("f1", [1, 2], [1, 0])
    for predictions, labels in (([1, 1], [1]), ([], [])):
        with pytest.raises(AssertionError, match="predictions for"):
            score("accuracy", predictions, labels)


def test_standard_error_is_the_binomial_one_or_none():
    assert standard_error("accuracy", 0.8, 400) == pytest.approx(0.02) and standard_error("accuracy", 1.0, 5) == 0
    assert [standard_error(metric, 0.8, 400) for metric in ("matthews", "f1", "pearson")] == [None] * 3
