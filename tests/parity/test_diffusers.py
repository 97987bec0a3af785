"""diffusers' DiTTransformer2DModel against Pliant, in both directions, on equal random weights (sheet A, 3.5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pliant
from pliant import Denoiser
from pliant.guidance import guide
from pliant.paths import NetworkTime, VPDiscrete
from support.networks import randomize, tiny_dit

diffusers = pytest.importorskip("diffusers")

TINY: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
}
TOLERANCE = 1e-5


def theirs(**options: Any) -> Any:
    """A tiny DiTTransformer2DModel with random weights; like their checkpoints, all blocks share the embedders."""
    network = diffusers.DiTTransformer2DModel(**{**TINY, **options}).eval()
    randomize(network, std=0.15)
    first = network.transformer_blocks[0].norm1.emb.state_dict()
    for block in network.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return network


def call(network: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return network(x, timestep=t, class_labels=y).sample


def inputs(channels: int = 4, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 517, 999]), torch.tensor([0, 4, 5])


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"out_channels": None},
        {"patch_size": 4, "num_layers": 1, "sample_size": 16},
        {"norm_eps": 1e-3, "in_channels": 3, "out_channels": 6},
    ],
    ids=str,
)
@torch.no_grad()
def test_forward(options: dict[str, Any], tmp_path: Path) -> None:
    network = theirs(**options)
    network.save_pretrained(tmp_path)
    model = pliant.load(tmp_path)
    assert model.config.frequency_divisor == 127
    assert model.config.norm2_eps == options.get("norm_eps", 1e-5)
    x, t, y = inputs(network.config.in_channels, network.config.sample_size)
    expected = call(network, x, t, y)
    assert expected.abs().mean() > 0.1
    print(f"diffusers forward: {difference(model.network(x, t.float(), y), expected):.1e}")
    assert difference(model.network(x, t.float(), y), expected) < TOLERANCE


@torch.no_grad()
def test_guided_as_their_pipeline_does(tmp_path: Path) -> None:
    """One doubled batch, all four channels of epsilon guided, the variance half dropped."""
    network = theirs()
    network.save_pretrained(tmp_path)
    model = pliant.load(tmp_path)
    x, _, y = inputs()
    y = y.clamp(max=4)
    null = torch.full_like(y, model.null_label)
    out = call(network, torch.cat([x, x]), torch.full((6,), 440), torch.cat([y, null]))[:, :4]
    expected = out[3:] + 4.0 * (out[:3] - out[3:])
    t = float(VPDiscrete().time_of_timestep(440))
    ours = guide(model(x, t, y).value, model(x, t, null).value, 4.0)
    print(f"diffusers guided: {difference(ours, expected):.1e}")
    assert difference(ours, expected) < TOLERANCE


@torch.no_grad()
def test_official_constants_would_be_wrong(tmp_path: Path) -> None:
    """The divisor matters: the same weights with the official constants give clearly other outputs."""
    network = theirs()
    network.save_pretrained(tmp_path)
    model = pliant.load(tmp_path)
    x, t, y = inputs()
    model.network.time_embed.divisor = 128
    assert difference(model.network(x, t.float(), y), call(network, x, t, y)) > 1e-2


@torch.no_grad()
def test_they_load_what_we_save(tmp_path: Path) -> None:
    options: dict[str, Any] = {"in_channels": 4, "learn_sigma": True, "frequency_divisor": 127}
    for eps in (1e-5, 1e-6):
        network = tiny_dit(norm2_eps=eps, **options)
        model = Denoiser(network, VPDiscrete(), "epsilon", NetworkTime.timesteps())
        pliant.save(model, tmp_path / "model", format="diffusers")
        loaded = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "model").eval()
        x, t, y = inputs()
        y = y.clamp(max=3)
        assert difference(call(loaded, x, t, y), network(x, t.float(), y)) < TOLERANCE
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "model" / "scheduler")
    assert torch.allclose(scheduler.alphas_cumprod.double(), VPDiscrete().alphas_cumprod, atol=1e-6)


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    network = theirs()
    network.save_pretrained(tmp_path / "theirs")
    model = pliant.load(tmp_path / "theirs")
    pliant.save(model, tmp_path / "ours", format="diffusers")
    back = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "ours").state_dict()
    assert back.keys() == network.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in network.state_dict().items())
    again = pliant.load(tmp_path / "ours")
    assert again.fingerprint() == model.fingerprint()


@pytest.mark.parametrize("storage", [{"safe_serialization": False}, {"max_shard_size": "40KB"}], ids=str)
def test_other_storage(storage: dict[str, Any], tmp_path: Path) -> None:
    """Pickled `.bin` weights, and weights in several files with an index."""
    network = theirs()
    network.save_pretrained(tmp_path / "one")
    network.save_pretrained(tmp_path / "other", **storage)
    assert not (tmp_path / "other" / "diffusion_pytorch_model.safetensors").exists()
    one, other = (pliant.load(tmp_path / name).network.state_dict() for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
def test_pipeline_folder(betas: str, tmp_path: Path) -> None:
    """transformer/ and scheduler/ of a pipeline."""
    ends = {"linear": (1e-4, 2e-2), "scaled_linear": (0.00085, 0.012)}[betas]
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=betas, beta_start=ends[0], beta_end=ends[1], clip_sample=False, prediction_type="v_prediction"
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    diffusers.DiTPipeline(theirs(), vae, scheduler).save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "transformer"):
        model = pliant.load(folder)
        assert model.path == VPDiscrete(betas=betas.replace("_", "-"))
        assert model.prediction == "v_prediction"
        assert model.network_time == NetworkTime.timesteps()
