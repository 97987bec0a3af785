"""The similarity filter follows the published rule, with its counter mended."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pliant.errors import ConfigError
from pliant.tasks.streaming import FilterState, SimilarityFilter
from pliant.tasks.streaming.similarity import cosine


def at_angle(c: float) -> torch.Tensor:
    """A frame of cosine c to (1, 0)."""
    return torch.tensor([c, math.sqrt(1 - c * c)], dtype=torch.float64)


@pytest.mark.parametrize(
    ("c", "p"), [(0.97, 0.0), (0.98, 0.0), (0.985, 0.25), (0.99, 0.5), (0.995, 0.75), (1.0, 1.0)]
)
def test_published_probabilities(c: float, p: float) -> None:
    assert SimilarityFilter(0.98).skip_probability(c) == pytest.approx(p, abs=1e-12)
    assert cosine(at_angle(1.0), at_angle(c)) == pytest.approx(c, abs=1e-12)


def decisions(rule: SimilarityFilter, frames: list[torch.Tensor]) -> str:
    """P(rocessed) or s(kipped), frame by frame."""
    state, found = FilterState(), ""
    for frame in frames:
        process, state = rule.decide(state, frame)
        found += "P" if process else "s"
    return found


def test_identical_frames_give_eleven_skips_and_a_frame() -> None:
    frame = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert decisions(SimilarityFilter(0.98, 10), [frame] * 61) == "P" + ("s" * 11 + "P") * 5
    assert decisions(SimilarityFilter(0.98, 0), [frame] * 7) == "PsPsPsP"


def test_the_counter_starts_anew_after_a_frame_by_chance() -> None:
    """Five skips, a different frame, then again eleven skips; the published code would count on and skip six."""
    a, b = at_angle(1.0), at_angle(0.0)
    assert decisions(SimilarityFilter(0.98, 10), [a] * 6 + [b] * 13) == "P" + "s" * 5 + "P" + "s" * 11 + "P"


def test_frames_are_compared_with_the_last_processed_one() -> None:
    """A slow drift is noticed: neighbours are alike (c = 0.9988), frames three apart are not (c = 0.9888 < 0.99)."""
    frames = [at_angle(math.cos(0.05 * k)) for k in range(31)]
    assert decisions(SimilarityFilter(0.99, 10, seed=1), frames).count("P") >= 10


def test_a_threshold_of_one_never_skips() -> None:
    assert decisions(SimilarityFilter(1.0), [at_angle(1.0)] * 5) == "PPPPP"


def test_chance_is_fair_and_seeded() -> None:
    rule = SimilarityFilter(0.98, 10**9, seed=3)
    state = FilterState(previous=at_angle(1.0))
    # Always against the same frame: c = 0.985 must be skipped a quarter of the time.
    found = [rule.decide(FilterState(state.previous, 0, k), at_angle(0.985))[0] for k in range(4000)]
    assert 0.75 - 0.03 < sum(found) / 4000 < 0.75 + 0.03  # four standard deviations
    frames = [at_angle(0.985), at_angle(1.0)] * 100
    assert decisions(rule, frames) == decisions(rule, frames)
    assert decisions(rule, frames) != decisions(SimilarityFilter(0.98, 10**9, seed=4), frames)


def test_black_frames() -> None:
    zero = torch.zeros(3)
    assert (cosine(zero, zero), cosine(zero, torch.ones(3))) == (1.0, 0.0)


def test_nonsense_is_refused() -> None:
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            SimilarityFilter(threshold)
    with pytest.raises(ConfigError, match="max_skip"):
        SimilarityFilter(0.98, -1)


@pytest.mark.parametrize("value", ["0.9", None, True, float("nan"), [0.9]])
def test_what_is_no_number_is_one_line_everywhere_in_streams(value: Any) -> None:
    from pliant.errors import PliantError
    from pliant.tasks.streaming.guidance import StreamGuidance
    from pliant.tasks.streaming.levels import check_levels, even_levels

    calls: list[Callable[[], object]] = [
        lambda: SimilarityFilter(threshold=value),
        lambda: SimilarityFilter(max_skip=value),
        lambda: StreamGuidance("self", scale=value),
        lambda: StreamGuidance("self", delta=value),
        lambda: check_levels([value]),
        lambda: even_levels(value, 2),
        lambda: even_levels(0.5, value),
    ]
    for call in calls:
        with pytest.raises(PliantError):
            call()
