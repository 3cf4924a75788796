"""Bootstrap intervals: closed forms, coverage, pairing, and resampling of whole pictures."""

from dataclasses import asdict

import numpy as np
import pytest

from openblip2.evaluate.result import difference_interval, interval, mean_interval

RANDOM = np.random.default_rng(3)


def test_the_interval_of_a_mean_is_the_normal_one_where_there_are_many_samples() -> None:
    scores = RANDOM.normal(0.4, 0.2, size=5000)
    found = mean_interval(scores)
    error = scores.std() / np.sqrt(len(scores))
    assert found.score == pytest.approx(scores.mean(), abs=1e-12)
    assert found.low == pytest.approx(scores.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(scores.mean() + 1.96 * error, abs=0.15 * error)
    assert found.n == 5000


def test_two_samples_draw_as_the_binomial_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two samples 0 and 1, the mean of a draw is 0, 0.5 or 1 with probability 1/4, 1/2, 1/4."""
    counts = np.array([[0.0], [1.0]])
    seen: list[np.ndarray] = []

    def score(sums: np.ndarray) -> np.ndarray:
        seen.append(sums[:, 0] / 2)
        return seen[-1]

    monkeypatch.setattr("openblip2.evaluate.result.DRAWS", 20_000)
    found = interval(counts, score)
    shares = [(seen[0] == value).mean() for value in (0, 0.5, 1)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.015)
    assert (found.score, found.low, found.high) == (0.5, 0, 1)


def test_a_seed_repeats_and_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = RANDOM.random(37)
    whole = mean_interval(scores)
    monkeypatch.setattr("openblip2.evaluate.result._AT_ONCE", 37 * 7 + 5)
    assert mean_interval(scores) == whole
    assert mean_interval(scores, seed=1) != whole


def test_equal_scores_leave_no_width() -> None:
    assert mean_interval(np.full(9, 0.3)).low == pytest.approx(0.3)
    assert mean_interval(np.full(9, 0.3)).high == pytest.approx(0.3)


def test_questions_of_one_picture_are_drawn_together() -> None:
    """Ten copies of every answer add no information; only resampling whole pictures takes this into account."""
    scores = RANDOM.random(40)
    pictures = [f"{number}.jpg" for number in range(40) for _ in range(10)]
    once, grouped = mean_interval(scores), mean_interval(scores.repeat(10), pictures)
    assert (grouped.score, grouped.low, grouped.high) == pytest.approx((once.score, once.low, once.high))
    assert grouped.n == 400
    blind = mean_interval(scores.repeat(10))
    assert blind.high - blind.low < 0.5 * (grouped.high - grouped.low)


def test_pictures_of_unlike_many_questions_weigh_by_their_questions() -> None:
    scores, pictures = np.array([1.0, 1.0, 1.0, 0.0]), ["a", "a", "a", "b"]
    found = mean_interval(scores, pictures)
    assert found.score == 0.75
    assert (found.low, found.high) == (0, 1)  # both draws are b, or both a, with probability 1/4 each
    apart = mean_interval(scores[[3, 0, 1, 2]], ["b", "a", "a", "a"])
    assert (apart.low, apart.high) == (found.low, found.high)


def test_a_difference_is_paired() -> None:
    """One system is always 0.01 better: only the paired interval, not two separate ones, shows the difference."""
    hard = RANDOM.random(200)
    found = difference_interval(hard + 0.01, hard)
    assert found.score == pytest.approx(0.01)
    assert found.low == pytest.approx(0.01)
    assert found.excludes(0)
    first, second = mean_interval(hard + 0.01), mean_interval(hard)
    assert not first.low > second.high


def test_no_difference_has_zero_inside() -> None:
    first = RANDOM.random(300)
    assert not difference_interval(first, RANDOM.permutation(first)).excludes(0)
    assert difference_interval(first, first).score == 0


def test_the_true_mean_is_inside_about_95_times_in_100() -> None:
    inside = sum(not mean_interval(RANDOM.random(60) < 0.3, seed=n).excludes(0.3) for n in range(300))
    assert 0.90 <= inside / 300 <= 0.98


def test_what_is_written_is_the_score_and_its_interval() -> None:
    found = mean_interval(np.array([0, 1, 1]), ["a", "b", "b"])
    assert asdict(found) == {"score": found.score, "low": found.low, "high": found.high, "n": 3}


def test_unlike_sizes_are_our_mistake() -> None:
    with pytest.raises(AssertionError):
        difference_interval(np.ones(3), np.ones(4))
    with pytest.raises(AssertionError):
        mean_interval(np.ones(3), ["a", "b"])
    with pytest.raises(AssertionError):
        mean_interval(np.ones(0))
