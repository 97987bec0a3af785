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
  pliant eval samples.npz --reference digits         samples that exist, as ADM's evaluator takes them
  pliant eval digits --reference digits:train --save-reference digits-train.safetensors
  accelerate launch -m pliant.cli eval cifar10 --reference cifar10-train.parquet --num 50000
"""

NUM = 2000
"""Images per repeat where nobody says how many."""
ALIASES = {"inception": "inception-v3-pool3"}


def register(app: typer.Typer) -> None:
    app.command("eval", epilog=EXAMPLES)(grouped(evaluate))


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder, file, bundled name (digits) or Hugging Face id; or samples that exist: an .npz (ADM's).",
            show_default=False,
        ),
    ],
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
    num: Annotated[
        int | None, typer.Option("--num", min=2, help="Images per repeat.  [default: 2000]", show_default=False)
    ] = None,
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
    if model.endswith(".npz"):
        typed = [("--num", num), ("--seed", seed), ("--random-classes", random_classes), ("--plan", plan),
                 ("--decode", decode), ("--format", format), ("--option", option)]  # fmt: skip
        extra = [*(name for name, value in typed if value not in (None, False, 0, [])), *choices.given()]
        if extra:
            raise ConfigError(f"an .npz holds samples that exist, all of which are measured: leave out {extra[0]}")
        if processes.main:
            _measure_file(Path(model), reference, extractor, repeats, save, batch_size, device, json)
        return
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
            num or NUM,
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


def _measure_file(
    file: Path,
    reference: str,
    extractor: str | None,
    repeats: int,
    save: Path | None,
    batch_size: int,
    device: str | None,
    json: bool,
) -> None:
    """The images of an .npz against real ones, in `repeats` equal parts."""
    from pliant.evaluation import NpzImages, evaluate_images, get_extractor, load_reference, save_reference

    if not file.exists():
        raise ConfigError(f"there is no file {file}; 'pliant sample MODEL --num 2000 -o {file.name}' writes one")
    samples = NpzImages(file)
    _, channels, height, width = samples.shape
    # The format has three channels, of grey images three equal ones.
    name = extractor or default_extractor((1 if (height, width) == (8, 8) else channels, height, width))
    network = get_extractor(ALIASES.get(name, name), device or "cpu")
    real = load_reference(reference, network, size=(height, width))
    if save is not None:
        save_reference(save, real)
    begun = time.perf_counter()
    report = evaluate_images(samples, real, network, batch=batch_size, repeats=repeats)
    seconds = time.perf_counter() - begun
    if json:
        emit_json({**report.to_dict(), "seconds": seconds})
        return
    print(report)
    print(f"  seconds: {seconds:.1f}")


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
    from pliant.evaluation import bundled_extractor

    return bundled_extractor(shape) or "inception"


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
