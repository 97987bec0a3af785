"""The analytic cost against every published number of DiT and FlexiDiT."""

from dataclasses import replace

import pytest

from pliant.compute import (
    BLOCKS,
    MATMUL,
    PUBLISHED,
    WITHOUT_CONDITIONING,
    TransformerShape,
    activation_bytes,
    cost_parts,
    flops,
    macs,
    parameter_count,
    weight_bytes,
)
from pliant.errors import ConfigError

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def dit(name: str, latent: int = 32) -> TransformerShape:
    """`dit("XL/2")`: the DiT of the paper on a latent of `latent` x `latent` x 4 with a learned variance."""
    size, patch = name.split("/")
    depth, width, heads = SIZES[size]
    side = int(patch)
    return TransformerShape(
        depth=depth,
        width=width,
        heads=heads,
        in_channels=4,
        out_channels=8,
        patch=(side, side),
        tokens=(latent // side) ** 2,
        classes=1001,
    )


XL2, XL4 = dit("XL/2"), dit("XL/4")

# Emu's denoiser as FlexiDiT's percentages imply it: 24 x 2048 at 1024 px, cross-attention's query and output
# linears counted, its text side not, rank-64 adapters unmerged on the weak side.
EMU = TransformerShape(
    depth=24, width=2048, heads=16, in_channels=8, out_channels=8, patch=(2, 2), tokens=4096, cross_tokens=1
)
EMU_WEAK = replace(EMU, patch=(4, 4), tokens=1024, lora_rank=64)
EMU_COUNT = BLOCKS - {"cross_context", "cross_attention"}


@pytest.mark.parametrize(
    ("name", "latent", "giga", "printed", "decimals"),
    [
        ("S/8", 32, 0.3581, 0.36, 2),
        ("S/4", 32, 1.4132, 1.4, 1),
        ("S/2", 32, 6.0581, 6.06, 2),
        ("B/8", 32, 1.4179, 1.42, 2),
        ("B/4", 32, 5.5664, 5.6, 1),
        ("B/2", 32, 23.0100, 23.01, 2),
        ("L/8", 32, 5.0122, 5.01, 2),
        ("L/4", 32, 19.6989, 19.7, 1),
        ("L/2", 32, 80.7105, 80.71, 2),
        ("XL/8", 32, 7.3935, 7.39, 2),
        ("XL/4", 32, 29.0479, 29.05, 2),
        ("XL/2", 32, 118.6382, 118.64, 2),
        ("XL/2", 64, 524.6055, 524.6, 1),
        ("XL/4", 64, 118.6807, 118.68, 2),
    ],
)
def test_published_dit_table(name: str, latent: int, giga: float, printed: float, decimals: int) -> None:
    measured = macs(dit(name, latent), PUBLISHED) / 1e9
    assert measured == pytest.approx(giga, rel=1e-4)
    assert round(measured, decimals) == printed


@pytest.mark.parametrize(
    ("name", "latent", "giga"),
    [
        ("S/2", 32, 6.0557),
        ("B/2", 32, 23.0051),
        ("L/2", 32, 80.6976),
        ("XL/2", 32, 118.6214),
        ("XL/2", 64, 524.5383),
    ],
)
def test_without_layer_norm(name: str, latent: int, giga: float) -> None:
    assert macs(dit(name, latent), MATMUL) / 1e9 == pytest.approx(giga, rel=1e-5)
    assert flops(dit(name, latent)) == 2 * macs(dit(name, latent), MATMUL)


def test_without_conditioning() -> None:
    assert macs(XL2, WITHOUT_CONDITIONING) / 1e9 == pytest.approx(118.3942, rel=1e-6)
    assert macs(XL4, WITHOUT_CONDITIONING) / 1e9 == pytest.approx(28.8164, rel=1e-5)
    assert ratio(XL4, XL2) == pytest.approx(0.2434, abs=5e-5)


def test_losing_attention_is_visible() -> None:
    """Sheet A, section 6: a count that drops the attention products gives 114.41 G."""
    without = macs(XL2, PUBLISHED - {"self_attention"}) / 1e9
    assert without == pytest.approx(114.41, abs=5e-3)
    assert abs(without - 118.64) > 1


@pytest.mark.parametrize(
    ("size", "attention", "mlp"),
    [
        ("XL/2", 1_509_949_440, 2_717_908_992),
        ("B/2", 704_643_072, 1_207_959_552),
        ("S/2", 201_326_592, 301_989_888),
    ],
)
def test_dydit_block_counts(size: str, attention: int, mlp: int) -> None:
    """DyDiT (arXiv 2410.03456) counts one layer as a = 4ND^2 + 2N^2D and f = 8ND^2."""
    shape = dit(size)
    parts = cost_parts(shape)
    assert parts.self_projections + parts.self_attention == shape.depth * attention
    assert parts.mlp == shape.depth * mlp


def ratio(
    weak: TransformerShape, powerful: TransformerShape, counted: frozenset[str] = WITHOUT_CONDITIONING
) -> float:
    return macs(weak, counted) / macs(powerful, counted)


def share(weak_calls: float, calls: float, r: float) -> float:
    """Relative compute in percent when `weak_calls` of `calls` cost r and the others 1."""
    return 100 * (weak_calls * r + (calls - weak_calls)) / calls


def test_weak_to_powerful_ratios() -> None:
    assert ratio(XL4, XL2, PUBLISHED) == pytest.approx(0.2448, abs=5e-5)
    assert ratio(dit("XL/4", 64), dit("XL/2", 64), PUBLISHED) == pytest.approx(0.2262, abs=5e-5)
    plain, plain_weak = replace(EMU, cross_tokens=0), replace(EMU_WEAK, cross_tokens=0, lora_rank=0)
    assert ratio(plain_weak, plain, BLOCKS) == pytest.approx(0.2031, abs=5e-5)
    assert ratio(EMU_WEAK, EMU, EMU_COUNT) == pytest.approx(0.2153, abs=5e-5)


def test_ratio_between_its_limits() -> None:
    """Linears dominate: 1/4. Attention dominates: 1/16."""
    wide = replace(XL2, width=16 * 65536, heads=16)
    long = replace(XL2, tokens=2**24)
    assert ratio(replace(wide, tokens=64), wide, BLOCKS) == pytest.approx(1 / 4, rel=1e-3)
    assert ratio(replace(long, tokens=2**22), long, BLOCKS) == pytest.approx(1 / 16, rel=1e-2)


@pytest.mark.parametrize(("weak_steps", "percent"), [(50, 84.9), (100, 69.7), (150, 54.6)])
def test_flexidit_schedules(weak_steps: int, percent: float) -> None:
    assert round(share(weak_steps, 250, ratio(XL4, XL2)), 1) == percent


@pytest.mark.parametrize(
    ("x", "y", "percent", "printed"),
    [(130, 130, 63.7, 64), (70, 70, 45.5, 46), (30, 0, 28.9, 29), (250, 250, 100, 100)],
)
def test_flexidit_guided_schedules(x: int, y: int, percent: float, printed: int) -> None:
    """x (y) final steps of 250 have a powerful conditional (guidance) call."""
    value = share(2 * 250 - x - y, 2 * 250, ratio(XL4, XL2))
    assert round(value, 1) == percent
    # The paper rounds 45.5 up.
    assert abs(value - printed) < 0.55


@pytest.mark.parametrize(
    ("percent_weak", "percent"), [(20, 84.3), (40, 68.6), (60, 52.9), (80, 37.2), (100, 21.5)]
)
def test_emu_schedules(percent_weak: int, percent: float) -> None:
    assert round(share(percent_weak, 100, ratio(EMU_WEAK, EMU, EMU_COUNT)), 1) == percent


def test_text_to_image_schedules_follow_one_ratio() -> None:
    """The text model's counting rule is not published; both of its tables follow from one back-solved ratio.

    DPM-Solver's "20 steps" only fit when its weak steps are counted out of 21 evaluations.
    """
    r = 0.2917
    for tenth, percent in enumerate((92.9, 85.8, 78.8, 71.7, 64.6, 57.5, 50.5, 43.4), start=1):
        assert share(tenth, 10, r) == pytest.approx(percent, abs=0.1)
    for weak, percent in zip((2, 4, 6, 8, 10), (93.3, 86.5, 79.8, 73.0, 66.3), strict=True):
        assert share(weak, 21, r) == pytest.approx(percent, abs=0.1)


def test_video_token_counts() -> None:
    """Movie-Gen-like latent 32 x 48 x 88."""
    for patch, tokens in (((1, 2, 2), 33_792), ((2, 2, 2), 16_896), ((1, 4, 4), 8_448)):
        shape = replace(EMU, patch=patch, tokens=tokens)
        assert shape.patch_volume * tokens == 32 * 48 * 88
        # The head's cost does not depend on the patch: every latent position is predicted once.
        assert cost_parts(shape).final == 32 * 48 * 88 * shape.width * shape.out_channels


@pytest.mark.parametrize(
    ("width", "long", "short", "padded", "pair", "four"),
    [(1152, 256, 64, 1.609, 1.014, 1.005), (2048, 4096, 1024, 1.662, 1.104, 1.039)],
)
def test_packing_ratios(width: int, long: int, short: int, padded: float, pair: float, four: float) -> None:
    """FlexiDiT's approaches to run two lengths in one step, with masked attention computed densely.

    Per four images, against two separate calls (approach 2): everything padded (1), each image's pair in one
    row (3), four short sequences in one long row (4).
    """

    def rows(count: int, tokens: int) -> int:
        shape = replace(XL2, depth=1, width=width, tokens=tokens)
        return count * macs(shape, BLOCKS)

    separate = rows(4, long) + rows(4, short)
    assert rows(8, long) / separate == pytest.approx(padded, abs=6e-4)
    assert rows(4, long + short) / separate == pytest.approx(pair, abs=6e-4)
    assert (rows(4, long) + rows(1, 4 * short)) / separate == pytest.approx(four, abs=6e-4)


@pytest.mark.parametrize(
    ("width", "rank", "percent"),
    [(1152, 32, 3.7), (2048, 64, 4.2)],
)
def test_unmerged_lora(width: int, rank: int, percent: float) -> None:
    """16 r D more per token and block; the whole of the block's linears is 12 D^2."""
    parts = cost_parts(replace(XL2, width=width, lora_rank=rank))
    assert parts.lora == XL2.depth * XL2.tokens * 16 * rank * width
    assert 100 * parts.lora / (parts.self_projections + parts.mlp) == pytest.approx(percent, abs=0.05)


def test_lora_parameters() -> None:
    """16.5 M for DiT-XL at rank 32, 50.3 M for 24 x 2048 at rank 64."""
    extra = parameter_count(replace(XL2, lora_rank=32)) - parameter_count(XL2)
    assert extra == pytest.approx(16.5e6, rel=2e-3)
    extra = parameter_count(EMU_WEAK) - parameter_count(replace(EMU_WEAK, lora_rank=0))
    assert extra == pytest.approx(50.3e6, rel=1e-3)


def test_sampling_cost_of_the_dit_paper() -> None:
    """250 guided steps of DiT-XL/2: 59.3 tera multiply-adds an image."""
    assert 2 * 250 * macs(XL2, PUBLISHED) / 1e12 == pytest.approx(59.3, abs=0.05)


@pytest.mark.parametrize(
    ("name", "count"),
    [("S/2", 32_865_056), ("B/2", 130_315_808), ("L/2", 457_840_672), ("XL/2", 674_834_720)],
)
def test_parameter_counts(name: str, count: int) -> None:
    assert parameter_count(dit(name)) == count
    assert weight_bytes(dit(name), bytes_per_value=2) == 2 * count


def test_growing_the_patch_of_xl() -> None:
    """Embedding and head of patch 4 instead of 2: 165,984 more parameters (sheet A, 1.4)."""
    assert parameter_count(XL4) - parameter_count(XL2) == 165_984


def test_activations_scale_with_batch_and_tokens() -> None:
    assert activation_bytes(XL2, batch=4) == 4 * activation_bytes(XL2)
    assert activation_bytes(XL4) * 4 == activation_bytes(XL2)
    assert activation_bytes(XL2, bytes_per_value=2) * 2 == activation_bytes(XL2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 0}, "depth=0"),
        ({"tokens": 1.5}, "tokens=1.5"),
        ({"lora_rank": -1}, "lora_rank=-1"),
        ({"patch": (2, 0)}, "patch"),
        ({"patch": ()}, "patch"),
        ({"heads": 7}, "7 heads"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
    ],
)
def test_impossible_shapes(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(XL2, **change)  # type: ignore[arg-type]


def test_unknown_part() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mlp'"):
        macs(XL2, frozenset({"mpl"}))
