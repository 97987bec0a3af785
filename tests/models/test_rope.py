"""Rotary positions: published frequencies and scales, and what they must leave alone. Sheet B, section 1."""

from __future__ import annotations

import math

import pytest
import torch

from pliant.errors import ConfigError, ShapeError
from pliant.models.rope import (
    NAMED,
    RopeScaling,
    apply_rope,
    axis_scales,
    axis_widths,
    frequencies,
    grid_positions,
    logit_scale,
    rope_table,
    yarn_scale,
)

RULES = ("linear", "ntk", "ntk-by-parts", "yarn")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("none", [1, 0.59948421, 0.35938138, 0.016681006, 0.0001668101]),
        ("linear", [0.8, 0.47958741, 0.28750509, 0.013344804, 0.00013344809]),
        ("ntk", [1, 0.59166682, 0.35006958, 0.015018187, 0.00013344809]),
        ("ntk-by-parts", [1, 0.59166682, 0.31878734, 0.013344804, 0.00013344809]),
        ("yarn", [1, 0.53953582, 0.28750509, 0.013344804, 0.00013344809]),
    ],
)
def test_reference_frequencies(rule, expected):
    """FiT-XL: 72 features per head, 20 tokens where training had 16; from the official formulas (sheet B)."""
    f = frequencies(36, 1.25, rule)[[0, 1, 2, 8, 17]]
    assert f.numpy() == pytest.approx(expected, rel=1e-6, abs=1e-10)


def test_lumina_frequency_aware_frequencies() -> None:
    """Sheet B, 2: 72 features per head, twice as long as the 64 tokens of training; no change at s = 1."""
    f = frequencies(36, 2.0, "frequency-aware", 64.0)[[0, 1, 2, 4, 9, 17]]
    assert f.numpy() == pytest.approx([1, 0.5145329, 0.2647441, 0.0700894, 0.005, 0.0000834], abs=1e-7)
    assert frequencies(36, 1.0, "frequency-aware", 64.0).numpy() == pytest.approx(frequencies(36).numpy(), rel=1e-12)
    with pytest.raises(ConfigError, match="2 pi"):
        RopeScaling.named("frequency-aware", 6.0)


def test_vision_ntk_scales_every_axis_by_its_own_length():
    lengths = torch.tensor([28.0, 14.0])
    decoupled = frequencies(36, axis_scales(lengths, RopeScaling.named("vision-ntk")), "ntk")[:, 1]
    coupled = frequencies(36, axis_scales(lengths, RopeScaling.named("ntk")), "ntk")[:, 1]
    assert decoupled.numpy() == pytest.approx([0.5800714, 0.5994842], abs=1e-7)
    assert coupled.numpy() == pytest.approx([0.5800714, 0.5800714], abs=1e-7)


def test_ntk_keeps_the_first_frequency_and_divides_the_last():
    scaled, plain = frequencies(36, 3.7, "ntk"), frequencies(36)
    assert float(scaled[0]) == 1.0
    assert float(scaled[-1]) == pytest.approx(float(plain[-1]) / 3.7, rel=1e-12)


def test_attention_scales_of_the_paper_and_of_the_code():
    square = torch.tensor([20.0, 20.0])
    kinds = ("paper", "code-side", "code-area")
    scale = {a: float(logit_scale(square, RopeScaling("ntk", attention=a))) for a in kinds}
    assert scale["paper"] == pytest.approx(math.log(400) / math.log(256), abs=1e-9)
    assert scale["paper"] == pytest.approx(1.0805, abs=1e-4)
    assert math.sqrt(scale["code-side"]) == pytest.approx(1.1534652, abs=1e-7)
    assert math.sqrt(scale["code-area"]) == pytest.approx(1.0979445, abs=1e-7)
    trained = torch.tensor([16.0, 16.0])
    assert float(logit_scale(trained, RopeScaling("ntk", attention="paper"))) == 1.0
    assert float(logit_scale(trained, RopeScaling("ntk", attention="code-area"))) == pytest.approx(1.125)
    small = torch.tensor([8.0, 16.0])  # 2 * 128 / 256 = 1: not above 1, so no scale
    assert float(logit_scale(small, RopeScaling("ntk", attention="code-area"))) == 1.0
    assert float(logit_scale(small, RopeScaling("ntk", attention="paper"))) == 1.0


def test_yarn_scales_by_the_longest_axis():
    assert float(yarn_scale(torch.tensor(1.25, dtype=torch.float64))) == pytest.approx(1.0223143, abs=1e-7)
    wide = logit_scale(torch.tensor([10.0, 20.0]), RopeScaling.named("vision-yarn"))
    assert math.sqrt(float(wide)) == pytest.approx(1.0223143, abs=1e-7)
    assert float(logit_scale(torch.tensor([10.0, 16.0]), RopeScaling.named("vision-yarn"))) == 1.0


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("size", [(16, 16), (4, 16), (7, 3)])
def test_every_rule_is_plain_at_training_sizes(name, size):
    positions = grid_positions(*(torch.arange(n) for n in size))
    for attention in ("none", "paper"):
        table = rope_table(positions, 72, lengths=size, scaling=RopeScaling.named(f"{name}+{attention}"))
        plain = rope_table(positions, 72)
        for got, want in zip(table, plain, strict=True):
            # The blends of three equal numbers may differ in the last bit of a double.
            assert (got - want).abs().max() <= 1e-7


def test_rows_turn_the_first_half_of_a_head():
    _, sin = rope_table(torch.tensor([[1.0, 0.0]]), 72)
    assert (sin[0, :18] != 0).all()
    assert (sin[0, 18:] == 0).all()


def test_pairs_are_adjacent_and_turn_forward():
    """(1, 0) becomes (cos, sin): a hand calculation that a swapped pair or sign would break."""
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
    cos, sin = rope_table(torch.tensor([[0.5]]), 4)
    a, b = 0.5, 0.5 * 10000**-0.5
    want = [math.cos(a), math.sin(a), -2 * math.sin(b), 2 * math.cos(b)]
    assert apply_rope(x, cos, sin)[0].numpy() == pytest.approx(want, abs=1e-7)


@pytest.mark.parametrize("rule", ["none", *RULES])
def test_products_depend_on_differences_only(rule):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 24, generator=generator).double()
    scaling = RopeScaling(rule, 8.0, attention="code-area" if rule == "ntk" else "none")
    lengths = (20.0, 9.0)
    factor = float(logit_scale(torch.tensor(lengths), scaling))

    def product(at: tuple[float, float], shift: tuple[float, float]) -> float:
        places = torch.tensor([at, (at[0] + shift[0], at[1] + shift[1])])
        cos, sin = rope_table(places, 24, lengths=lengths, scaling=scaling)
        return float(apply_rope(q, cos[0], sin[0]) @ apply_rope(k, cos[1], sin[1])) / factor

    for shift in ((0.0, 0.0), (3.0, -2.0), (-7.0, 5.0)):
        values = [product(at, shift) for at in ((7.0, 3.0), (12.0, 8.0), (19.0, 4.5))]
        assert max(values) - min(values) < 1e-4
    assert product((0.0, 0.0), (0.0, 0.0)) == pytest.approx(float(q @ k), abs=1e-5)
    assert abs(product((0.0, 0.0), (2.0, 0.0)) - product((0.0, 0.0), (0.0, 2.0))) > 1e-2


def test_one_table_for_a_batch_of_sizes_and_for_a_packed_row():
    """Online: per sample and per token, each as if it were alone."""
    scaling = RopeScaling.named("vision-yarn+paper", 4.0)
    sizes = [(6, 3), (2, 9)]
    grids = [grid_positions(*(torch.arange(n) for n in size)) for size in sizes]
    alone = [rope_table(g, 12, lengths=s, scaling=scaling) for g, s in zip(grids, sizes, strict=True)]
    together = rope_table(
        torch.stack(grids), 12, lengths=torch.tensor(sizes)[:, None].double(), scaling=scaling
    )
    each = torch.cat([torch.tensor([s]).expand(18, 2) for s in sizes])
    packed = rope_table(torch.cat(grids), 12, lengths=each, scaling=scaling)
    for part in (0, 1):
        assert torch.equal(together[part], torch.stack([table[part] for table in alone]))
        assert torch.equal(packed[part], torch.cat([table[part] for table in alone]))


def test_one_and_three_axes():
    assert axis_widths(72, 2) == (36, 36)
    assert axis_widths(64, 3) == (20, 22, 22)
    assert axis_widths(8, 1) == (8,)
    video = grid_positions(torch.arange(2), torch.arange(3), torch.arange(4))
    assert video.shape == (24, 3)
    assert video[5].tolist() == [0, 1, 1]
    cos, sin = rope_table(video, 64)
    assert cos.shape == (24, 32)
    assert (sin[12, :10] != 0).all()  # the second frame, row 0, column 0
    assert (sin[12, 10:] == 0).all()


def test_both_ways_of_turning_agree(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 5, 16, generator=generator)
    cos, sin = rope_table(torch.randn(5, 2, generator=generator), 16)
    fast = apply_rope(x, cos, sin)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert (apply_rope(x, cos, sin) - fast).abs().max() < 1e-6
    assert apply_rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_config_round_trip_and_bad_input():
    scaling = RopeScaling.named("vision-ntk+code-area", 24.0)
    assert scaling == RopeScaling("ntk", 24.0, True, "code-area")
    assert RopeScaling.from_dict(scaling.to_dict()) == scaling
    with pytest.raises(ConfigError, match="vision-ntk"):
        RopeScaling.named("visionntk")
    with pytest.raises(ConfigError, match="paper"):
        RopeScaling.named("ntk+papers")
    with pytest.raises(ConfigError, match="rule"):
        RopeScaling("dynamic")
    with pytest.raises(ConfigError, match="train_length"):
        RopeScaling("ntk", 0)
    with pytest.raises(ConfigError, match="needs the lengths"):
        rope_table(torch.zeros(3, 2), 8, scaling=RopeScaling("ntk"))
    with pytest.raises(ShapeError, match="2 axes"):
        rope_table(torch.zeros(3, 2), 8, lengths=(3, 3, 3), scaling=RopeScaling("ntk"))
    with pytest.raises(ConfigError, match="even head width"):
        rope_table(torch.zeros(3, 3), 4)
    with pytest.raises(ConfigError, match="at least 4 features"):
        frequencies(2, 2.0, "ntk")
