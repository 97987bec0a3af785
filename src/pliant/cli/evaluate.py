"""`pliant eval`: a number with its complete recipe."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import options as opt
from pliant.cli.console import emit_json, progress
from pliant.cli.option_groups import grouped
from pliant.cli.planning import PlanOptions, cost_facts, own_precision, plan_from, plans_in
from pliant.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from pliant.cli.models import Opened
    from pliant.plans import AnyPlan
    from pliant.solvers import Solver

EXAMPLES = """\b
Examples:
  pliant eval digits --budget 60% --steps 20 --reference digits --num 1000
  pliant eval digits --plan plan.json --reference digits --num 1000 --repeats 3
  pliant eval cifar10 --reference cifar10-train.parquet --extractor cifar10-classifier --num 2000
  pliant eval dit-xl --decode sd-vae --reference VIRTUAL_imagenet256.npz --extractor inception --num 50000
  pliant eval digits --reference digits:train --save-reference digits-train.safetensors
  accelerate launch -m pliant.cli eval cifar10 --reference cifar10-train.parquet --num 50000
"""

ALIASES = {"inception": "inception-v3-pool3"}


def register(app: typer.Typer) -> None:
    app.command("eval", epilog=EXAMPLES)(grouped(evaluate))


def evaluate(
    model: opt.Model,
    reference: Annotated[
        str,
        typer.Option(
            "--reference",
            help="digits, a folder, a Parquet file, an .npz (ADM's, pytorch-fid's, clean-fid's), or saved statistics.",
            show_default=False,
        ),
    ],
    extractor: Annotated[
        str | None,
        typer.Option(
            "--extractor",
            help="digits-classifier, cifar10-classifier, inception, dinov2, clip, hf:<Hub id>, or a folder of a "
            "transformers model. Default: by the image size.",
            show_default=False,
        ),
    ] = None,
    num: Annotated[int, typer.Option("--num", min=2, help="Images per repeat.")] = 2000,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Repeats with other seeds, for an interval.")] = 1,
    seed: opt.Seed = 0,
    random_classes: Annotated[
        bool, typer.Option("--random-classes", help="Draw the classes instead of taking them in turn.")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option("--save-reference", help="Keep the reference's statistics: .safetensors, or .npz for Inception."),
    ] = None,
    plan: opt.PlanFile = None,
    choices: PlanOptions = PlanOptions(),  # noqa: B008, a frozen value
    batch_size: opt.BatchSize = 64,
    decode: opt.Decoder = None,
    device: opt.Device = None,
    format: opt.Format = None,
    option: opt.LoadOptions = None,
    json: opt.JSON = False,
) -> None:
    """Sample a model and measure the images against real ones.

    Beside the Fréchet distance: kernel distances, precision and recall, density and coverage, spatial distance,
    Inception score and class accuracy, as far as extractor and reference allow. The distance is named after the network
    whose features it uses; only Inception's is an FID. Distances depend on the number of images: compare equal numbers
    only. Started by accelerate launch or torchrun, the processes share the seeds, and the numbers are those of one.
    """
    from pliant.cli.models import open_model
    from pliant.evaluation import evaluate as run
    from pliant.evaluation import get_extractor, load_reference, save_reference
    from pliant.evaluation.processes import started
    from pliant.plans import Plan, RoutedSampler, Sampler

    processes = started()
    denoiser = (opened := open_model(model, format, option, device or processes.device)).denoiser
    chosen = plan_from(plan, denoiser, choices)
    decoder = None
    if decode is not None:
        from pliant.cli.decoding import open_decoder

        decoder = open_decoder(decode, denoiser)
    elif denoiser.config.in_channels not in (1, 3):
        raise ConfigError("this model makes latents, which have no features: give --decode with its autoencoder")
    name = extractor or default_extractor(denoiser.image_shape)
    network = get_extractor(ALIASES.get(name, name), str(denoiser.device))
    real = load_reference(reference, network, size=None if decoder else denoiser.image_shape[1:])
    if save is not None and processes.main:
        save_reference(save, real)
    ready: Sampler | RoutedSampler
    ready = Sampler(denoiser, chosen) if isinstance(chosen, Plan) else RoutedSampler(denoiser, chosen)
    begun = time.perf_counter()

    def images(labels: Tensor, seeds: list[int]) -> Tensor:
        drawn = ready(labels, seeds)
        return drawn if decoder is None else decoder(drawn)

    with progress("sampling") as advance:
        report = run(
            images,
            real,
            network,
            num,
            batch=batch_size,
            num_classes=denoiser.num_classes,
            class_sampling="random" if random_classes else "balanced",
            first_seed=seed,
            repeats=repeats,
            describe=recipe_facts(opened, chosen, decode, batch_size),
            progress=advance if processes.main else None,
            processes=processes,
        )
    if not processes.main:
        return
    seconds = time.perf_counter() - begun
    if json:
        emit_json({**report.to_dict(), "cost": cost_facts(chosen, denoiser), "seconds": seconds})
        return
    print(report)
    print(f"  seconds: {seconds:.1f} on {processes.size} process{'es' if processes.size > 1 else ''}")
    if report.interval is None:
        print("no interval: give --repeats 3 or more")


def solver_text(solver: Solver) -> str:
    """A solver's name with the options that are not its usual ones: "ddim (eta=0.5)"."""
    from pliant.errors import PliantError
    from pliant.solvers import get_solver

    config = solver.to_config()
    try:
        usual = get_solver(solver.name).to_config()
    except PliantError:  # fitted ones have no usual options
        return solver.name
    options = [f"{k}={v}" for k, v in config.items() if isinstance(v, (bool, int, float, str)) and usual.get(k) != v]
    return f"{solver.name} ({', '.join(options)})" if options else solver.name


def default_extractor(shape: tuple[int, int, int]) -> str:
    """The extractor for images (C, H, W) where none is named."""
    return {(1, 8, 8): "digits-classifier", (3, 32, 32): "cifar10-classifier"}.get(shape, "inception")


def recipe_facts(opened: Opened, plan: AnyPlan, decoder: str | None, batch_size: int) -> dict[str, Any]:
    """What a reader must know of model and sampling; the evaluation adds extractor, reference, seeds and versions."""
    from pliant.cli.models import weights_hash

    denoiser = opened.denoiser
    cost, steps = plan.cost(denoiser), [s for one in plans_in(plan) for s in one.steps]
    counts = sorted({len(one.steps) for one in plans_in(plan)})
    guided = [s.guidance for s in steps if s.guidance is not None]
    return {
        "model": opened.name,
        "source": opened.source,
        "weights_sha256": weights_hash(denoiser),
        "plan": plan.digest(),
        "made_as": plan.provenance,
        "solver": ", ".join(sorted({solver_text(s.solver) for s in steps})),
        "steps": counts[0] if len(counts) == 1 else counts,
        "NFE": cost.evaluations,
        "network_calls": cost.calls,
        "guidance": sorted({g.scale for g in guided} | ({1.0} if len(guided) < len(steps) else set())),
        "guided_channels": sorted({str(g.channels or "all") for g in guided}) or "none guided",
        "precision": sorted({s.compute.precision or own_precision(denoiser) or "auto" for s in steps}),
        "GFLOP_per_image": cost.flops / 1e9,
        "share_of_full_compute": cost.share,
        "batch_size": batch_size,
        **({"autoencoder": decoder} if decoder else {}),
    }
