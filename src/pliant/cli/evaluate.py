"""`pliant eval`: a number with its complete recipe."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import options as opt
from pliant.cli.console import emit_json, progress
from pliant.cli.intervals import interval
from pliant.cli.planning import PlanOptions, cost_facts, own_precision, plan_from
from pliant.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from pliant.evaluation import EvaluationReport, FeatureExtractor, Reference

EXAMPLES = """\b
Examples:
  pliant eval digits --budget 60% --steps 20 --reference digits --num 1000
  pliant eval digits --plan plan.json --reference digits --num 1000 --repeats 3
  pliant eval cifar10 --reference cifar10-train.parquet --extractor cifar10-classifier --num 2000
  pliant eval dit-xl --decode sd-vae --reference VIRTUAL_imagenet256.npz --extractor inception --num 50000
"""

ALIASES = {"inception": "inception-v3-pool3"}
BOOTSTRAP_DIM = 256
"""Largest feature for which a hundred resampled distances take seconds."""


def register(app: typer.Typer) -> None:
    app.command("eval", epilog=EXAMPLES)(evaluate)


def evaluate(
    model: opt.Model,
    reference: Annotated[
        str,
        typer.Option(
            "--reference",
            help="digits, a folder, a Parquet file, an ADM .npz, or saved statistics.",
            show_default=False,
        ),
    ],
    extractor: Annotated[
        str | None,
        typer.Option(
            "--extractor", help="digits-classifier, cifar10-classifier, inception. Default: by the image size."
        ),
    ] = None,
    num: Annotated[int, typer.Option("--num", min=2, help="Images per repeat.")] = 2000,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Repeats with other seeds, for an interval.")] = 1,
    seed: opt.Seed = 0,
    plan: opt.PlanFile = None,
    budget: opt.Budget = None,
    steps: opt.Steps = None,
    solver: opt.SolverName = None,
    grid: opt.GridName = None,
    cache: opt.CacheName = None,
    guide: opt.GuideName = None,
    guidance: opt.GuidanceScale = None,
    guided_channels: opt.GuidedChannels = None,
    weak_steps: opt.WeakSteps = None,
    weak_guidance_steps: opt.WeakGuidanceSteps = None,
    weak: opt.WeakPatch = None,
    weak_last: opt.WeakLast = False,
    precision: opt.PrecisionName = None,
    batch_size: opt.BatchSize = 64,
    decode: opt.Decoder = None,
    device: opt.Device = None,
    format: opt.Format = None,
    option: opt.LoadOptions = None,
    json: opt.JSON = False,
) -> None:
    """Sample a model and measure the images against real ones.

    The Fréchet distance is named after the network whose features it uses; only Inception's is an FID. Distances
    depend on the number of images: compare equal numbers only.
    """
    from pliant.cli.models import open_model, weights_hash
    from pliant.evaluation import get_extractor, load_reference

    choices = PlanOptions(
        budget=budget,
        steps=steps,
        solver=solver,
        grid=grid,
        cache=cache,
        guide=guide,
        guidance=guidance,
        guided_channels=guided_channels,
        weak_steps=weak_steps,
        weak_guidance_steps=weak_guidance_steps,
        weak=weak,
        weak_last=weak_last,
        precision=precision,
    )
    opened = open_model(model, format, option, device)
    denoiser = opened.denoiser
    chosen = plan_from(plan, denoiser, choices)
    decoder = None
    if decode is not None:
        from pliant.cli.decoding import open_decoder

        decoder = open_decoder(decode, denoiser)
    elif denoiser.config.in_channels not in (1, 3):
        raise ConfigError("this model makes latents, which have no features: give --decode with its autoencoder")
    network = get_extractor(ALIASES.get(name := extractor or _default_extractor(denoiser.sample_shape), name))
    size = None if decoder else denoiser.config.input_size
    real = load_reference(reference, network, size=size)
    solvers = sorted({s.solver.name for s in chosen.steps})
    cost = cost_facts(chosen, denoiser)
    describe = {
        "model": opened.name,
        "source": opened.source,
        "weights_sha256": weights_hash(denoiser),
        "plan": chosen.digest(),
        "made_as": chosen.provenance,
        "steps": len(chosen.steps),
        "solver": ", ".join(solvers),
        "guidance": sorted({s.guidance.scale if s.guidance else 1.0 for s in chosen.steps}),
        "precision": sorted({s.compute.precision or own_precision(denoiser) or "auto" for s in chosen.steps}),
        "GFLOP_per_image": cost["flops_per_image"] / 1e9,
        "share_of_full_compute": cost["share"],
        "batch_size": batch_size,
        **({"autoencoder": decode} if decode else {}),
        **_software(),
    }
    begun = time.perf_counter()
    report, features = measure(
        opened.denoiser, chosen, decoder, real, network, num, repeats, seed, batch_size, describe
    )
    seconds = time.perf_counter() - begun
    bounds = interval(report.distance, features, real, denoiser.num_classes)
    if json:
        emit_json({**report.to_dict(), "interval": bounds, "cost": cost, "seconds": seconds})
        return
    print(report)
    print(f"  seconds: {seconds:.1f}")
    if bounds is None:
        print("no interval: give --repeats 3 or more")
    else:
        low, high = bounds["low"], bounds["high"]
        print(f"{report.metric}: {report.distance.mean:.4g}, 95 % interval {low:.4g} to {high:.4g} ({bounds['how']})")


def _default_extractor(shape: tuple[int, int, int]) -> str:
    return {(1, 8, 8): "digits-classifier", (3, 32, 32): "cifar10-classifier"}.get(shape, "inception")


def _software() -> dict[str, str]:
    import torch

    from pliant import __version__

    return {"pliant": __version__, "torch": str(torch.__version__)}


def measure(
    denoiser: Any,
    plan: Any,
    decoder: Any,
    reference: Reference,
    extractor: FeatureExtractor,
    num: int,
    repeats: int,
    seed: int,
    batch_size: int,
    describe: dict[str, Any],
) -> tuple[EvaluationReport, list[Tensor]]:
    """The report, and the samples' features for a bootstrap (only of small extractors)."""
    from pliant.evaluation import evaluate as run
    from pliant.evaluation import from_uint8, to_uint8
    from pliant.plans import Sampler

    sampler = Sampler(denoiser, plan)
    features: list[Tensor] = []

    def draw(labels: Tensor, seeds: list[int]) -> Tensor:
        images = sampler(labels, seeds)
        images = images if decoder is None else decoder(images)
        if repeats == 1 and extractor.dim <= BOOTSTRAP_DIM:
            features.append(extractor(from_uint8(to_uint8(images.cpu()))).cpu())
        return images

    with progress("sampling") as advance:
        report = run(
            draw,
            reference,
            extractor,
            num,
            batch=batch_size,
            num_classes=denoiser.num_classes,
            first_seed=seed,
            repeats=repeats,
            describe=describe,
            progress=advance,
        )
    return report, features
