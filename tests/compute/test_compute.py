"""`Compute`: validation, JSON round trip, equality as a batching key."""

import json

import pytest

from pliant.compute import Compute
from pliant.errors import ConfigError


@pytest.mark.parametrize(
    "compute",
    [
        Compute(),
        Compute.of(patch=4),
        Compute.of(patch=(1, 4, 4)),
        Compute(merged=False),
        Compute(precision="bf16"),
    ],
)
def test_round_trip_through_json(compute: Compute) -> None:
    again = Compute.from_dict(json.loads(json.dumps(compute.to_dict())))
    assert again == compute
    assert hash(again) == hash(compute)


def test_absent_fields_take_their_defaults() -> None:
    assert Compute.from_dict({}) == Compute()
    assert Compute.from_dict({"patch": 4}) == Compute(patch=(4, 4))


def test_one_side_means_a_square() -> None:
    assert Compute.of(patch=4) == Compute(patch=(4, 4))
    assert Compute.of(patch=4).describe() == "patch 4x4"
    assert Compute.of(patch=4, merged=False, precision="bf16").describe() == "patch 4x4, unmerged, bf16"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"patch": [0, 4]}, "positive"),
        ({"patch": [2, 2, 2, 2]}, "patch"),
        ({"patch": [2.0, 2.0]}, "patch"),
        ({"patch": True}, "patch"),
        ({"patch": "4"}, "list of sides"),
        ({"merged": 1}, "merged"),
        ({"pach": 4}, "did you mean 'patch'"),
        ([4, 4], "object"),
    ],
)
def test_bad_values_are_named(values: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Compute.from_dict(values)  # type: ignore[arg-type]
