"""Images of any size: the resize rule, sets of several sizes, and caches of their latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pliant.errors import ConfigError, DataError
from pliant.models.tiny_autoencoder import TinyConfig
from pliant.training.data import Encoded, LatentSet, SizedSet, cached_latents, fitted_size, open_any_size
from pliant.training.data.sizes import size_groups
from pliant.training.draws import Draws
from support.autoencoders import written_tiny
from support.cli import refused, run_here

UNFLIPPED = torch.zeros(1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("width", "height", "side", "wanted"),
    [
        (500, 375, 256, (288, 208)),
        (500, 375, 512, (496, 368)),
        (640, 480, 256, (288, 208)),
        (640, 480, 512, (576, 432)),
        (1000, 300, 256, (464, 128)),
        (1000, 300, 512, (928, 272)),
        (200, 100, 256, (192, 96)),
        (12, 40, 256, (16, 48)),
        (256, 256, 256, (256, 256)),
        (8, 8, 256, (16, 16)),
    ],
)
def test_published_sizes(width: int, height: int, side: int, wanted: tuple[int, int]) -> None:
    """Sheet B, 1: (width, height) as printed there."""
    assert fitted_size(height, width, side, 16) == (wanted[1], wanted[0])
    assert fitted_size(width, height, side, 16) == wanted


def test_every_size_is_within_the_budget_and_close_in_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    for height, width in torch.randint(60, 4000, (300, 2), generator=generator).tolist():
        rows, columns = fitted_size(height, width, 256, 16)
        assert rows % 16 == columns % 16 == 0
        assert 0 < rows * columns <= 256**2
        assert rows <= max(height, 16)
        # Rounding down loses less than one unit of either side.
        assert abs(columns / rows - width / height) < (columns + 16) / rows - columns / (rows + 16)


@pytest.mark.parametrize(("height", "width"), [(4, 9000), (9000, 4), (1, 1000)])
def test_extreme_shapes_are_refused(height: int, width: int) -> None:
    with pytest.raises(DataError, match="too long and thin"):
        fitted_size(height, width, 64, 16)


def test_impossible_requests() -> None:
    with pytest.raises(ConfigError, match="at least one unit"):
        fitted_size(100, 100, 8, 16)
    with pytest.raises(DataError, match="empty"):
        fitted_size(0, 10, 64, 16)


def folder(place: Path) -> Path:
    """Six images of three sizes, two that cannot be used."""
    for i, (height, width) in enumerate([(8, 12), (12, 8), (8, 12), (9, 13), (40, 10), (12, 8)]):
        (place / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(place / "ab"[i % 2] / f"{i}.png")
    (place / "a" / "6.png").write_bytes(b"\x89PNG damaged")
    Image.new("RGB", (400, 1)).save(place / "b" / "7.png")
    return place


def test_a_folder_of_many_sizes(tmp_path: Path) -> None:
    images = open_any_size(str(folder(tmp_path / "d")), 3, 16, 4)
    assert isinstance(images, SizedSet)
    assert images.sizes.tolist() == [[8, 12], [8, 12], [32, 8], [12, 8], [8, 12], [12, 8]]
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(images.skipped) == 2
    assert "damaged" in images.skipped[0]
    assert "too long and thin" in images.skipped[1]
    exact = torch.from_numpy(np.array(Image.open(tmp_path / "d" / "a" / "0.png")))
    assert torch.allclose(images.image(0), exact.permute(2, 0, 1).float() / 127.5 - 1)
    mirrored = images.samples(torch.tensor([0, 1]), torch.tensor([False, True]), Draws.single(2))
    assert torch.equal(mirrored[1], images.image(1).flip(-1))
    with pytest.raises(DataError, match="one size, these are of 8x12, 12x8"):
        images.samples(torch.tensor([0, 3]), UNFLIPPED.expand(2), Draws.single(2))
    with pytest.raises(DataError, match="at least one sample"):
        images.samples(torch.tensor([], dtype=torch.int64), UNFLIPPED[:0], Draws.single(0))


def test_a_share_of_the_large_images_is_cropped(tmp_path: Path) -> None:
    """FiTv2's mixed data: squares only of images larger than the square both ways, chosen by their place."""
    for i in range(60):
        (tmp_path / "d" / "a").mkdir(parents=True, exist_ok=True)
        size = (20, 12) if i % 2 else (20, 6)
        image = Image.new("RGB", size, (0, 0, 0))
        image.paste((255, 0, 0), (size[0] // 2 - 4, 0, size[0] // 2 + 4, size[1]))
        image.save(tmp_path / "d" / "a" / f"{i:02}.png")
    none, half, every = (open_any_size(str(tmp_path / "d"), 3, 8, 4, crop=share) for share in (0.0, 0.5, 1.0))
    assert not (none.sizes == 8).all(1).any()
    square = (half.sizes == 8).all(1)
    assert 8 <= int(square.sum()) <= 22 and not square[::2].any()
    assert torch.equal(square, (open_any_size(str(tmp_path / "d"), 3, 8, 4, crop=0.5).sizes == 8).all(1))
    assert (every.sizes[1::2] == 8).all() and torch.equal(every.sizes[::2], none.sizes[::2])
    middle = half.image(int(square.nonzero()[0]))  # 20x12 -> 13x8 -> its middle 8 columns, of which 5 are red
    assert bool((middle[0, :, 2:6] > 0.5).all()) and float(middle[1].max()) < -0.5


def test_images_beyond_memory_are_decoded_again(tmp_path: Path) -> None:
    from pliant.training.data.sizes import AnySizeImages
    from pliant.training.data.sources import open_source

    source = open_source(str(folder(tmp_path / "d")))
    kept, lazy = (AnySizeImages(source, 3, 16, 4, memory_limit=limit) for limit in (10**6, 300))
    for index in range(6):
        assert torch.equal(kept.image(index), lazy.image(index))


def test_no_usable_image(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="none of the 1 images"):
        open_any_size(str(tmp_path), 3, 16, 4)
    with pytest.raises(DataError, match="1 or 3 channels"):
        open_any_size(str(folder(tmp_path / "d")), 4, 16, 4)


def halve(x: Tensor) -> Encoded:
    return Encoded(torch.nn.functional.avg_pool2d(x, 2) + 3)


def test_latents_of_many_sizes_in_one_cache(tmp_path: Path) -> None:
    images = open_any_size(str(folder(tmp_path / "d")), 3, 16, 4)
    seen: list[tuple[int, int]] = []
    data = cached_latents(
        tmp_path / "c", images, halve, "k", scaling=(3.0, 2.0), flip=True, batch_size=2, shard_size=2,
        dtype=torch.float16, advance=lambda done, total: seen.append((done, total)),
    )
    assert isinstance(data, SizedSet)
    assert seen[-1] == (12, 12)
    assert data.channels == 3
    assert data.sizes.tolist() == [[4, 6], [4, 6], [4, 6], [6, 4], [6, 4], [16, 4]]
    assert data.labels.tolist() == [0, 0, 1, 1, 1, 0]
    order = torch.cat([members for _, members in size_groups(images.sizes)]).tolist()
    for place, index in enumerate(order):
        for flip in (False, True):
            got = data.samples(torch.tensor([place]), torch.tensor([flip]), Draws.single(1))[0]
            image = images.image(index)
            want = (halve((image.flip(-1) if flip else image)[None]).mean[0] - 3) * 2
            assert (got - want).abs().max() < 4e-3  # stored in fp16
    with pytest.raises(DataError, match="several sizes"):
        _ = data.shape
    with pytest.raises(DataError, match="one size"):
        data.samples(torch.tensor([0, 5]), UNFLIPPED.expand(2), Draws.single(2))
    assert LatentSet(tmp_path / "c").sizes.tolist() == data.sizes.tolist()


def test_statistics_weigh_every_latent_pixel_alike(tmp_path: Path) -> None:
    images = open_any_size(str(folder(tmp_path / "d")), 3, 16, 4)
    data = cached_latents(tmp_path / "c", images, halve, "k")
    everything = torch.cat([halve(images.image(i)[None]).mean.flatten(2)[0] for i in range(6)], dim=1)
    assert data.statistics["mean"] == pytest.approx(everything.mean(1).tolist(), abs=1e-5)
    assert data.statistics["std"] == pytest.approx(everything.std(1, unbiased=False).tolist(), abs=1e-5)


def test_encode_verb(tmp_path: Path) -> None:
    written_tiny(tmp_path, TinyConfig(2, False))
    source = folder(tmp_path / "d")
    arguments = ("encode", source, tmp_path / "out", "--autoencoder", tmp_path, "--side", 16, "--patch", 1)
    report = run_here(*arguments, "--flip", "--dtype", "fp16", "--preview", tmp_path / "p.png", "--json").json
    assert report["count"] == 6
    assert report["sizes"] == [{"size": [1, 1], "count": 5}, {"size": [4, 1], "count": 1}]
    assert len(report["skipped"]) == 2
    assert Image.open(tmp_path / "p.png").size[0] > 8
    assert LatentSet(tmp_path / "out").channels == 2
    assert "6 latents of 2 channels" in run_here(*arguments, "--flip", "--dtype", "fp16").out
    refused(run_here(*arguments, "--dtype", "int8"), "int8", "fp16")
    refused(run_here(*arguments, "--precision", "fp8"), "fp8", "fp16")
    refused(run_here("encode", tmp_path / "none", tmp_path / "o", "--autoencoder", tmp_path), "does not exist")
    refused(run_here("encode", source, tmp_path / "o", "--autoencoder", tmp_path / "none"), "none")
