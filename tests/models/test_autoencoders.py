"""Autoencoders: the tiny ones from files we write, diffusers' at tiny sizes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pliant.errors import FormatError, ShapeError
from pliant.models.autoencoders import (
    config_scaling,
    decoded,
    downscale_factor,
    encoded,
    latent_channels,
    load_autoencoder,
    posterior,
)
from pliant.models.tiny_autoencoder import TinyAutoencoder, TinyConfig
from support.autoencoders import written_tiny


@pytest.mark.parametrize("norm", [False, True])
def test_a_pair_of_files_is_loaded_by_folder_or_by_either_file(tmp_path: Path, norm: bool) -> None:
    network = written_tiny(tmp_path, TinyConfig(5, norm))
    images = torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for source in (tmp_path, tmp_path / "tae_encoder.pth", tmp_path / "tae_decoder.pth"):
        loaded = load_autoencoder(str(source))
        assert (latent_channels(loaded), downscale_factor(loaded), config_scaling(loaded)) == (5, 8, (0.0, 1.0))
        assert not any(p.requires_grad for p in loaded.parameters())
        latents = encoded(loaded, images, None)
        assert torch.equal(latents, network.encode(images).latents)
        assert latents.shape == (2, 5, 3, 2)
        assert torch.equal(decoded(loaded, latents, None), network.decode(latents).sample)


def test_a_pair_of_safetensors_files(tmp_path: Path) -> None:
    """Sorted by name, where "10." comes before "2.": the last convolution is found all the same."""
    from safetensors.torch import save_file

    network = written_tiny(tmp_path, TinyConfig(5, True))
    for part in ("encoder", "decoder"):
        save_file(getattr(network, part).state_dict(), tmp_path / f"other_{part}.safetensors")
    loaded = load_autoencoder(str(tmp_path / "other_decoder.safetensors"))
    images = torch.rand(1, 3, 8, 16, generator=torch.Generator().manual_seed(1))
    assert latent_channels(loaded) == 5
    assert torch.equal(encoded(loaded, images, None), network.encode(images).latents)


def test_normalisation_is_undone_once(tmp_path: Path) -> None:
    written_tiny(tmp_path, TinyConfig(2, False))
    network = load_autoencoder(str(tmp_path))
    images = torch.rand(1, 3, 8, 16, generator=torch.Generator().manual_seed(1))
    stated = {"shift": [0.5, -1.0], "scale": [2.0, 0.25]}
    raw = encoded(network, images, None)
    seen = encoded(network, images, stated)
    assert torch.allclose(seen[:, 0], (raw[:, 0] - 0.5) * 2)
    assert torch.allclose(seen[:, 1], (raw[:, 1] + 1) * 0.25)
    assert torch.allclose(decoded(network, seen, stated), decoded(network, raw, None), atol=1e-5)


def test_taef2_gives_photographs_back(shared: Path) -> None:
    """TAEF2 as published: 32 channels, 8x, and a round trip close to the image (25.4 dB measured on this one)."""
    from pliant.training.data import open_any_size

    network = load_autoencoder(str(shared / "weights" / "taef2_encoder.pth"))
    assert latent_channels(network) == 32
    photograph = open_any_size(str(shared / "data" / "clothing-192px.parquet"), 3, 192, 16, limit=1).image(0)[None]
    latents = encoded(network, photograph, None)
    assert latents.shape[2:] == (photograph.shape[2] // 8, photograph.shape[3] // 8)
    assert 0.7 < latents.std() < 1.1
    back = decoded(network, latents, None)
    assert -10 * torch.log10(((back - photograph) / 2).square().mean()) > 24


def test_autoencoders_of_diffusers() -> None:
    """KL (a distribution), Tiny (latents) and DC (one latent, 4x here) behind one function."""
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

    torch.manual_seed(0)
    kl = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2, scaling_factor=0.5,
                       down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=2,
    )
    dc = AutoencoderDC(
        latent_channels=2, attention_head_dim=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 16, 16), decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()), scaling_factor=0.4,
    )
    images = torch.rand(1, 3, 16, 24)
    for autoencoder, factor, scale in ((kl, 2, 0.5), (tiny, 2, 1.0), (dc, 4, 0.4)):
        mean, std = posterior(autoencoder.eval(), images)
        assert (std is not None) == (autoencoder is kl)
        assert downscale_factor(autoencoder) == factor
        assert mean.shape == (1, 2, 16 // factor, 24 // factor)
        assert torch.allclose(encoded(autoencoder, images, None), mean * scale)
        assert decoded(autoencoder, mean * scale, None).shape == images.shape
    with pytest.raises(ShapeError, match="multiples of its factor"):
        posterior(kl, torch.rand(1, 3, 16, 23))


def test_sizes_that_do_not_divide(tmp_path: Path) -> None:
    network = written_tiny(tmp_path, TinyConfig(2, False))
    with pytest.raises(ShapeError, match="nearest: 16x24"):
        network.encode(torch.zeros(1, 3, 18, 23))
    with pytest.raises(ShapeError, match="nearest: 8x8"):
        network.encode(torch.zeros(1, 3, 3, 8))


def test_files_that_are_no_tiny_autoencoder(tmp_path: Path) -> None:
    written_tiny(tmp_path, TinyConfig(2, False))
    (tmp_path / "half").mkdir()
    (tmp_path / "tae_encoder.pth").rename(tmp_path / "half" / "tae_encoder.pth")
    with pytest.raises(FormatError, match="two files"):
        load_autoencoder(str(tmp_path / "half"))
    (tmp_path / "half" / "tae_decoder.pth").write_bytes(b"not tensors")
    with pytest.raises(FormatError, match="truncated, damaged"):
        load_autoencoder(str(tmp_path / "half"))
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "half" / "tae_decoder.pth")
    with pytest.raises(FormatError, match="decoder is no TAESD-like"):
        load_autoencoder(str(tmp_path / "half"))
    torch.save([1, 2], tmp_path / "half" / "tae_decoder.pth")
    with pytest.raises(FormatError, match="no state dict"):
        load_autoencoder(str(tmp_path / "half"))
    other = TinyAutoencoder(TinyConfig(4, False)).decoder.state_dict()
    torch.save(other, tmp_path / "half" / "tae_decoder.pth")
    with pytest.raises(FormatError, match=r"'1.weight' does not fit"):
        load_autoencoder(str(tmp_path / "half"))
    torch.save(other, tmp_path / "half" / "second_encoder.pth")
    with pytest.raises(FormatError, match="several autoencoders"):
        load_autoencoder(str(tmp_path / "half"))
