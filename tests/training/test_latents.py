"""Latent caches, with diffusers' autoencoders at tiny random sizes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pliant.errors import DataError
from pliant.models.autoencoders import config_scaling
from pliant.training import train
from pliant.training.data import Encoded, ImageSet, LatentSet, autoencoder_encode, cached_latents
from pliant.training.draws import Draws
from support.training import tiny_config


def images(n: int = 7) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(n) % 2, ("a", "b"))


def halve(x: Tensor) -> Encoded:
    """A transparent "autoencoder": block means, plus 3."""
    return Encoded(torch.nn.functional.avg_pool2d(x, 2) + 3)


def plain(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.bool)


def test_cache_equals_encoding_directly(tmp_path: Path) -> None:
    data = cached_latents(tmp_path / "c", images(), halve, "k", scaling=(1.0, 0.5), batch_size=2, shard_size=3)
    wanted = torch.tensor([5, 0, 6, 3])
    direct = (halve(images().samples(wanted, plain(4), Draws.single(4))).mean - 1) * 0.5
    assert torch.equal(data.samples(wanted, plain(4), Draws.single(4)), direct)
    assert data.shape == (3, 4, 4)
    assert data.class_names == ("a", "b")
    assert data.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_mirrored_latents_are_latents_of_mirrored_images(tmp_path: Path) -> None:
    data = cached_latents(tmp_path / "c", images(), halve, "k", scaling=(0.0, 1.0), flip=True)
    got = data.samples(torch.tensor([2]), torch.tensor([True]), Draws.single(1))
    assert torch.equal(got, halve(images().samples(torch.tensor([2]), torch.tensor([True]), Draws.single(1))).mean)
    unflipped = cached_latents(tmp_path / "d", images(), halve, "k")
    with pytest.raises(DataError, match="mirrored"):
        unflipped.samples(torch.tensor([2]), torch.tensor([True]), Draws.single(1))


def test_standardising_counts_the_posterior_noise(tmp_path: Path) -> None:
    def noisy(x: Tensor) -> Encoded:
        return Encoded(halve(x).mean, torch.full((len(x), 3, 4, 4), 2.0))

    data = cached_latents(tmp_path / "c", images(200), noisy, "k")
    sample = data.samples(torch.arange(200), plain(200), Draws.single(200))
    assert sample.mean((0, 2, 3)).abs().max() < 0.1
    assert sample.std((0, 2, 3)).tolist() == pytest.approx([1.0] * 3, abs=0.05)
    assert min(data.statistics["std"]) > 2.0
    again = data.samples(torch.arange(200), plain(200), Draws.single(200, step=1))
    assert not torch.equal(sample, again)


def test_cache_is_reused_for_the_same_key_only(tmp_path: Path) -> None:
    calls = []

    def counting(x: Tensor) -> Encoded:
        calls.append(len(x))
        return halve(x)

    for key, total in (("a", 7), ("a", 7), ("b", 14)):
        cached_latents(tmp_path / "c", images(), counting, key)
        assert sum(calls) == total


def test_interrupted_or_damaged_caches_are_refused(tmp_path: Path) -> None:
    def failing(x: Tensor) -> Encoded:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_latents(tmp_path / "c", images(), failing, "k")
    assert not (tmp_path / "c").exists()
    with pytest.raises(DataError, match="complete"):
        LatentSet(tmp_path / "c")
    data = cached_latents(tmp_path / "c", images(), halve, "k")
    shard = next(data.folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(DataError, match="complete"):
        LatentSet(tmp_path / "c")


def test_latents_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not finite"):
        cached_latents(tmp_path / "c", images(), lambda x: Encoded(x * float("inf")), "k")


def test_diffusers_autoencoders(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, AutoencoderTiny

    torch.manual_seed(0)
    kl = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2, scaling_factor=0.5).eval()
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=2,
    ).eval()
    for name, autoencoder in (("kl", kl), ("tiny", tiny)):
        encoded = autoencoder_encode(autoencoder)(images().samples(torch.arange(7), plain(7), Draws.single(7)))
        assert (encoded.std is None) == (name == "tiny")
        scaling = config_scaling(autoencoder)
        data = cached_latents(tmp_path / name, images(), autoencoder_encode(autoencoder), name, scaling=scaling)
        latents = data.samples(torch.arange(7), plain(7), Draws.single(7))
        assert latents.shape == (7, *data.shape)
        if name == "tiny":
            assert torch.allclose(latents, encoded.mean, atol=1e-5)
    assert config_scaling(kl) == (0.0, 0.5)


def tiny_autoencoder(folder: Path) -> str:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
        scaling_factor=0.7,
    )
    autoencoder.save_pretrained(folder)
    return str(folder)


def test_a_model_is_trained_on_the_latents_of_an_image_folder(tmp_path: Path) -> None:
    from PIL import Image

    for i in range(8):
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (30 * i, 100, 200 - 20 * i)).save(tmp_path / "data" / "ab"[i % 2] / f"{i}.png")
    dit = {"input_size": [8, 8], "patch_size": [2, 2], "in_channels": 4, "width": 16, "depth": 1, "heads": 2}
    data = {
        "source": str(tmp_path / "data"),
        "autoencoder": tiny_autoencoder(tmp_path / "autoencoder"),
        "flip": True,
    }
    config = tiny_config(tmp_path / "run", model={"dit": {**dit, "num_classes": 2}}, data=data, steps=2, batch_size=4)
    result = train(config)
    stored = result.denoiser.metadata["latents"]
    assert len(stored["shift"]) == len(stored["scale"]) == 4
    assert (tmp_path / "run" / "latents" / "latents.json").is_file()
    # A fine-tuning run keeps the normalisation that the model was trained with, whatever its own data are.
    weak = {"from": str(result.model_folder), "flexify": {"patch_sizes": [4], "options": {"rank": 2}}}
    again = tiny_config(
        tmp_path / "weak", model=weak, data={**data, "limit": 4}, objective={"name": "distill"}, steps=1, batch_size=4
    )
    assert train(again).denoiser.metadata["latents"] == stored
