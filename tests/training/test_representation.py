"""REPA on the native backbone (sheet B, section 6), with a tiny random DINOv2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pliant
from pliant.errors import ConfigError, FormatError
from pliant.training import parse_config, train
from pliant.training.draws import Draws
from pliant.training.objectives.any_size import AnySizeFlow
from pliant.training.objectives.base import SizedBatch
from pliant.training.representation import RepresentationAlignment, TokenEncoder, alignment_loss, attach_projector
from pliant.training.setup import build_denoiser, build_objective


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7, intermediate_size=32
    )
    folder = tmp_path_factory.mktemp("encoder")
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


def tree(output: Path, encoder: Path) -> dict[str, object]:
    return {
        "model": {"flexible": {"input_size": [4, 4], "in_channels": 3, "width": 32, "depth": 3, "heads": 2,
                               "num_classes": 2, "train_sides": [2, 8], "train_pixels": [4, 64]}},
        "objective": {"name": "any_size", "align": {"encoder": str(encoder), "layer": 2, "hidden": 24}},
        "data": {"source": "nowhere"},
        "steps": 2,
        "tokens": 100,
        "output": str(output),
    }  # fmt: skip


def batch() -> SizedBatch:
    return SizedBatch((torch.rand(2, 3, 4, 6) - 0.5, torch.rand(1, 3, 4, 4) - 0.5), torch.tensor([0, 1, 1]))


def test_the_loss_is_minus_the_cosine() -> None:
    x, y = torch.randn(2, 5, 8), torch.zeros(2, 5, 8)
    torch.testing.assert_close(alignment_loss(x, 3.0 * x), -torch.ones(2))
    torch.testing.assert_close(alignment_loss(x, -0.2 * x), torch.ones(2))
    left, right = y.clone(), y.clone()
    left[..., 0], right[..., 1] = 1.0, 1.0
    torch.testing.assert_close(alignment_loss(left, right), torch.zeros(2))


def test_gradients_reach_the_blocks_before_the_layer_and_the_projector_only(encoder: Path, tmp_path: Path) -> None:
    config = parse_config(tree(tmp_path, encoder))
    denoiser = build_denoiser(config)
    objective = build_objective(config, denoiser)
    assert isinstance(objective, RepresentationAlignment)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    samples = batch()
    full, flow = objective(denoiser, samples, Draws.single(3)), objective.flow(denoiser, samples, Draws.single(3))
    alignment = float(full.logs["alignment"])
    assert -1 <= alignment <= 1
    term = full.loss - flow.loss
    assert float(term.detach()) == pytest.approx(0.5 * alignment, abs=1e-5)
    term.backward()  # type: ignore[no-untyped-call]
    reached = {n: float(p.grad.abs().max()) for n, p in denoiser.network.named_parameters() if p.grad is not None}
    assert reached["projector.0.weight"] > 1e-5 and reached["blocks.1.qkv.weight"] > 1e-6
    assert reached["modes.1x1.weight"] > 1e-6 or reached["modes.2x2.weight"] > 1e-6
    assert reached.get("blocks.2.qkv.weight", 0.0) < 1e-7 and reached.get("modes.1x1.head.weight", 0.0) < 1e-7


def test_the_encoder_sees_maps_of_its_patches(encoder: Path) -> None:
    found = TokenEncoder.load(str(encoder))
    maps = found(torch.rand(2, 3, 12, 20) * 2 - 1)
    assert maps.shape == (2, 16, 4, 4) and not maps.requires_grad
    image = torch.zeros(1, 3, 28, 28)
    brighter = image.clone()
    brighter[:, :, :7, 21:] = 1.0  # the top right patch
    change = (found(brighter) - found(image)).abs().sum(1)[0]
    assert int(change.argmax()) == 3


def test_a_run_trains_resumes_and_exports_without_the_projector(encoder: Path, tmp_path: Path) -> None:
    from PIL import Image

    for i in range(8):
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", ((4, 6, 8, 4)[i % 4], 4), (30 * i, 10, 200 - 20 * i)).save(
            tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        )
    config = parse_config({**tree(tmp_path / "run", encoder), "data": {"source": str(tmp_path / "data"), "side": 6}})
    done = train(config, quiet=True)
    longer = config.model_copy(update={"steps": 3, "resume": "latest"})
    done = train(longer, quiet=True)
    model = pliant.load(done.model_folder)
    assert not [name for name, _ in model.network.named_parameters() if "projector" in name]
    plan = pliant.Plan.uniform(model, 2, "euler")
    assert torch.equal(pliant.sample(model, plan, [0]), pliant.sample(done.denoiser, plan, [0]))
    before = pliant.sample(model, plan, [0])
    attach_projector(model, 16, 8)
    assert torch.equal(pliant.sample(model, plan, [0]), before)


def test_what_cannot_be_aligned(encoder: Path, tmp_path: Path) -> None:
    config = parse_config(tree(tmp_path, encoder))
    denoiser = build_denoiser(config)
    deep = RepresentationAlignment(AnySizeFlow(), TokenEncoder.load(str(encoder)), layer=4)
    with pytest.raises(ConfigError, match="after 4 blocks; the network has 3"):
        deep.check(denoiser)
    with pytest.raises(FormatError, match="not a vision transformer"):
        TokenEncoder.load(str(tmp_path))
    latents = tree(tmp_path, encoder)
    latents["model"]["flexible"]["in_channels"] = 4  # type: ignore[index]
    other = parse_config(latents)
    with pytest.raises(ConfigError, match=r"name align\.autoencoder"):
        build_objective(other, build_denoiser(other))
    dit = replace(denoiser, network=pliant.DiT(pliant.DiTConfig(width=16, depth=1, heads=2)))
    with pytest.raises(ConfigError, match="for flexible networks"):
        attach_projector(dit, 16, 8)
