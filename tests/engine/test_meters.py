from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsis.engine.meters import RunningMean, mean_average_precision
from wsis.errors import InputError


def brute_average_precision(scores: list[float], labels: list[int]) -> float:
    """Sum over thresholds of (recall gain) times precision, counted image by image."""
    positives = sum(labels)
    if not positives:
        return math.nan
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [y for s, y in zip(scores, labels, strict=True) if s >= threshold]
        recall = sum(chosen) / positives
        total += (recall - recall_before) * sum(chosen) / len(chosen)
        recall_before = recall
    return total


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 30), st.integers(1, 5))
def test_equals_brute_force_with_many_ties(data, n, k):
    scores = data.draw(st.lists(st.integers(-3, 3), min_size=n * k, max_size=n * k))
    labels = data.draw(st.lists(st.integers(0, 1), min_size=n * k, max_size=n * k))
    scores, labels = np.array(scores).reshape(n, k) / 8, np.array(labels).reshape(n, k)
    expected = [
        brute_average_precision(s.tolist(), y.tolist())
        for s, y in zip(scores.T, labels.T, strict=True)
    ]
    value, per_class = mean_average_precision(torch.tensor(scores), torch.tensor(labels))
    np.testing.assert_allclose(per_class.numpy(), expected, rtol=1e-12)
    known = [x for x in expected if not math.isnan(x)]
    if known:
        assert value == pytest.approx(sum(known) / len(known), rel=1e-12)
    else:
        assert math.isnan(value)


def test_the_example_of_scikit_learn():
    scores, labels = torch.tensor([[0.1, 0.4, 0.35, 0.8]]).T, torch.tensor([[0, 0, 1, 1]]).T
    value, per_class = mean_average_precision(scores, labels)
    assert value == pytest.approx(0.8333333333333333, abs=1e-15)
    assert per_class.shape == (1,)
    assert per_class.dtype == torch.float64


def test_constant_scores_give_the_share_of_positives():
    value, _ = mean_average_precision(torch.zeros(8, 1), torch.tensor([[1.0]] * 3 + [[0.0]] * 5))
    assert value == 3 / 8


def test_layouts_and_types_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40, 6, generator=generator).half()
    labels = torch.rand(40, 6, generator=generator) > 0.7
    expected = mean_average_precision(scores, labels)[0]
    assert mean_average_precision(scores.float().T.contiguous().T, labels.long())[0] == expected
    assert mean_average_precision(scores.double(), labels.byte())[0] == expected


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(2, 3), r"\[3, 2\] and \[2, 3\]"),
        (torch.zeros(3), torch.zeros(3), r"\[N, K\]"),
        (torch.full((2, 1), math.nan), torch.zeros(2, 1), "finite"),
        (torch.zeros(2, 1), torch.full((2, 1), 2), "0 or 1"),
        (torch.zeros(2, 1), torch.full((2, 1), math.nan), "0 or 1"),
    ],
)
def test_bad_input(scores, labels, message):
    with pytest.raises(InputError, match=message):
        mean_average_precision(scores, labels)


def test_running_mean_counts_each_name():
    mean = RunningMean()
    assert mean.mean() == {}
    mean.update({"total": torch.tensor(2.0, requires_grad=True), "cls": 1.0})
    mean.update({"total": 4.0, "cls": torch.tensor(2.0), "seg": 5.0})
    assert mean.mean() == {"total": 3.0, "cls": 1.5, "seg": 5.0}
    assert list(mean.mean()) == ["total", "cls", "seg"]
    mean.reset()
    assert mean.mean() == mean.state() == {}


def test_running_mean_goes_on_bit_for_bit_after_json():
    values = torch.rand(50, generator=torch.Generator().manual_seed(1))
    straight, part = RunningMean(), RunningMean()
    for value in values:
        straight.update({"total": value})
    for value in values[:23]:
        part.update({"total": value})
    resumed = RunningMean()
    resumed.load_state(json.loads(json.dumps(part.state())))
    for value in values[23:]:
        resumed.update({"total": value})
    assert resumed.mean() == straight.mean()
    assert resumed.state() == straight.state()
    assert straight.mean()["total"] == pytest.approx(float(values.double().mean()), rel=1e-14)
