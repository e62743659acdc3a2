"""Metrics: worked by hand, and equal to scikit-learn's and SciPy's on random arrays."""
import math

import numpy as np
import pytest

from data.metrics import METRICS, bootstrap_differences, interval, mcnemar, paired_t, ranks, score, seeds_needed, standard_error

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


# Comparing two methods


@pytest.mark.parametrize("n", [2, 3, 5, 10, 40])
def test_the_paired_t_test_is_scipys(n):
    stats = pytest.importorskip("scipy.stats")
    for shift in (0, 0.3, 3):
        d = np.random.default_rng(n).normal(size=n) + shift
        mean, low, high, p = paired_t(d)
        theirs = stats.ttest_1samp(d, 0)
        interval = theirs.confidence_interval()
        assert p == pytest.approx(theirs.pvalue, abs=1e-6) and mean == pytest.approx(d.mean())
        assert (low, high) == (pytest.approx(interval.low, rel=1e-4, abs=1e-6), pytest.approx(interval.high, rel=1e-4, abs=1e-6))


def test_the_paired_t_test_by_hand():
    mean, low, high, p = paired_t([1.0, 2.0, 3.0])  # t = 2 / (1 / sqrt(3)) = 3.464 with 2 degrees of freedom; t(0.975) = 4.303
    assert mean == 2 and p == pytest.approx(0.0742, abs=1e-4) and high - mean == pytest.approx(4.3027 / math.sqrt(3), abs=1e-3) == mean - low
    assert paired_t([0.5]) == (0.5, None, None, None) and paired_t([0.0, 0.0])[3] == 1 and paired_t([1.0, 1.0]) == (1, 1, 1, 0)


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (5, 1), (20, 20), (400, 350)])
def test_mcnemars_test_is_the_exact_binomial(counts):
    stats = pytest.importorskip("scipy.stats")
    a, b = counts
    labels = np.ones(a + b + 7, dtype=int)
    ours, theirs = labels.copy(), labels.copy()
    theirs[:a], ours[a:a + b] = 0, 0
    p = mcnemar([ours, ours, 1 - ours], [theirs] * 3, labels)
    assert p == pytest.approx(stats.binomtest(a, a + b).pvalue if a + b else 1.0)


def test_the_bootstrap_covers_the_difference_and_narrows_with_more_examples():
    draw = np.random.default_rng(1)
    widths = []
    for n in (100, 2500):
        labels = draw.integers(0, 2, n)
        ours, theirs = ([np.where(draw.random(n) < right, labels, 1 - labels) for _ in range(3)] for right in (0.9, 0.8))
        low, high = interval(bootstrap_differences("accuracy", ours, theirs, labels))
        observed = np.mean([(a == labels).mean() - (b == labels).mean() for a, b in zip(ours, theirs)])
        assert low < observed < high
        widths.append(high - low)
        assert interval(bootstrap_differences("accuracy", ours, ours, labels)) == (0, 0)
    assert widths[0] / widths[1] == pytest.approx(5, rel=0.4)


def test_the_seeds_needed_have_the_power_that_they_promise():
    """With so many seeds, and hardly fewer, a paired t test finds a true difference of half a point in 80 % of the trials."""
    assert seeds_needed([0.01]) is None and seeds_needed([0.003, 0.003]) == 2
    stats, seen = pytest.importorskip("scipy.stats"), []
    for sd in (0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.02):
        n = seeds_needed([-sd / 2**0.5, sd / 2**0.5])

        def power(n):
            bound = stats.t.ppf(0.975, n - 1)
            return 1 - stats.nct.cdf(bound, n - 1, 0.005 / sd * n**0.5) + stats.nct.cdf(-bound, n - 1, 0.005 / sd * n**0.5)

        assert power(n) > 0.78 and (n <= 3 or power(n - 2) < 0.8), (sd, n, power(n))
        seen.append(n)
    assert seen == sorted(seen) and seen[0] < 5 and seen[-1] > 100
