"""Sheet B, section 6, check 4: after equal steps a linear probe reads classes better off an aligned layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pliant import Denoiser
from pliant.evaluation.features import ClassifierExtractor, get_extractor
from pliant.models.flexible import FlexibleConfig, FlexibleTransformer
from pliant.models.network import Taps
from pliant.paths import NetworkTime, get_path
from pliant.training.data.images import digits
from pliant.training.draws import Draws
from pliant.training.objectives.any_size import AnySizeFlow
from pliant.training.objectives.base import SizedBatch
from pliant.training.representation import RepresentationAlignment, attach_projector

LAYER, STEPS = 2, 200


class Classifier:
    """A fixed encoder that knows digits: maps of the shipped classifier's last stage, standardised over the digits."""

    def __init__(self, images: Tensor) -> None:
        self.mean, self.std = torch.zeros(1), torch.ones(1)
        maps = self(images)
        self.dim = maps.shape[1]
        self.std, self.mean = torch.std_mean(maps, dim=(0, 2, 3), keepdim=True)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        extractor = get_extractor("digits-classifier")
        assert isinstance(extractor, ClassifierExtractor)
        return (extractor.stages(images[:, :1])[-1].float() - self.mean) / self.std.clamp(min=1e-3)


def trained(weight: float, seed: int, images: Tensor, labels: Tensor) -> Denoiser:
    torch.manual_seed(seed)
    config = FlexibleConfig(
        input_size=(8, 8), patch_sizes=((2, 2),), in_channels=1, width=48, depth=4, heads=4, num_classes=10,
        rope_theta=100.0,
    )  # fmt: skip
    model = Denoiser(FlexibleTransformer(config), get_path("linear"), "velocity", NetworkTime(scale=1000.0))
    encoder = Classifier(images)
    attach_projector(model, encoder.dim, 96)
    objective = RepresentationAlignment(AnySizeFlow(class_dropout=1.0), encoder, LAYER, weight)
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=2e-3)
    for step in range(STEPS):
        rows = torch.randint(len(images), (64,), generator=torch.Generator().manual_seed(1000 * seed + step))
        loss = objective(model, SizedBatch((images[rows],), labels[rows]), Draws.single(64, seed, step)).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def probed(model: Denoiser, images: Tensor, labels: Tensor) -> float:
    """Accuracy of ridge regression on the mean token after the layer, of digits with a third of noise."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    taps: Taps = {LAYER: []}
    t = torch.full((len(images),), 0.3, dtype=torch.float64)
    null = torch.full_like(labels, model.null_label)
    model.packed([model.path.mix(images, noise, t)], t, null, None, taps)
    seen = taps[LAYER][0].mean(1).double()
    seen = torch.cat([(seen - seen.mean(0)) / seen.std(0).clamp(min=1e-6), torch.ones(len(seen), 1)], dim=1)
    half = len(seen) // 2
    wanted = torch.nn.functional.one_hot(labels, 10).double()
    gram = seen[:half].T @ seen[:half] + torch.eye(seen.shape[1])
    weights = torch.linalg.solve(gram, seen[:half].T @ wanted[:half])
    return float(((seen[half:] @ weights).argmax(1) == labels[half:]).double().mean())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_probe_reads_an_aligned_layer_better(seed: int) -> None:
    data = digits(1, (8, 8))
    images, labels = data.pixels, data.labels
    with_, without = (probed(trained(weight, seed, images, labels), images, labels) for weight in (0.5, 0.0))
    print(f"probe accuracy, seed {seed}: aligned {with_:.3f}, plain {without:.3f}")
    assert with_ > without + 0.02
