"""Options that several verbs share, so that they are spelt and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Folder, file, bundled name (digits) or Hugging Face id.", show_default=False),
]
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", help="Format of the model, where its content does not say it (e.g. sit).", show_default=False
    ),
]
LoadOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KEY=VALUE",
        help="What a foreign file does not say: heads, input_size, num_classes, path, prediction. Repeatable.",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1, mps. Default: cuda if there is one.", show_default=False),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images computed at once.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the first image; the next ones count up.")]
Decoder = Annotated[
    str | None,
    typer.Option(
        "--decode",
        metavar="AUTOENCODER",
        help="Turns latents into images: diffusers autoencoder (folder or id), or TAESD-like files.",
    ),
]

# What a plan is made from.
PlanFile = Annotated[Path | None, typer.Option("--plan", help="A plan file; replaces all options below.")]
Budget = Annotated[
    str | None, typer.Option(
        "--budget",
        help='Of full compute: 60%, 0.6; FLOPs per image: "30 GFLOP"; or time: "2 s", "350 ms", "8 s for 4 images".',
    ),
]
ThroughputFile = Annotated[
    Path | None,
    typer.Option("--throughput", metavar="FILE", help="Throughput table ('pliant bench -o') that predicts seconds."),
]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Sampling steps.  [default: 50]", show_default=False)]
SolverName = Annotated[
    str | None,
    typer.Option(
        "--solver", help="dpmpp-2m, heun, euler, ddim:eta=0.5, ddpm, ...  [default: dpmpp-2m]", show_default=False
    ),
]
GridName = Annotated[
    str | None,
    typer.Option(
        "--grid",
        help="Times of the steps: uniform, karras, log-snr, shifted:shift=3, resolution (shifted by the size), ...  "
        "[default: the path's own]",
        show_default=False,
    ),
]
StateSize = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="HxW",
        help="Size of the images, for models of any size: 160x320. Without --decode, of the states.",
        show_default=False,
    ),
]
Extrapolation = Annotated[
    str | None,
    typer.Option(
        "--extrapolation",
        help="How positions beyond training are met: none, linear, ntk, yarn, vision-ntk, vision-yarn, ...",
        show_default=False,
    ),
]
CacheName = Annotated[
    str | None,
    typer.Option(
        "--cache",
        help="Reuse between steps, by preset: fora:interval=3, teacache:threshold=0.2, taylorseer, ...; "
        "calibrate=8 measures what a preset must know of the model. See docs/caching.md.",
        show_default=False,
    ),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option("--guidance", help="Classifier-free guidance scale; 1 is none.  [default: 1]", show_default=False),
]
GuideName = Annotated[
    str | None,
    typer.Option(
        "--guide",
        help="How --guidance is applied: interval:least=0.28,most=1.6, every:period=3, fastercache, once, zero-star, "
        "projected:momentum=-0.5, damped, tangential, banded:low=1, cfg++:strength=0.6. See docs/guidance.md.",
        show_default=False,
    ),
]
GuidedChannels = Annotated[
    int | None,
    typer.Option("--guided-channels", min=1, help="Guide only the first so many (3: as DiT and SiT papers)."),
]
WeakSteps = Annotated[
    int | None, typer.Option("--weak-steps", min=0, help="Exactly so many weak steps, instead of a budget.")
]
WeakGuidanceSteps = Annotated[
    int | None,
    typer.Option(
        "--weak-guidance-steps", min=0, help="Powerful steps guided by the weak call instead of the null label."
    ),
]
WeakKind = Annotated[
    str | None,
    typer.Option(
        "--weak",
        metavar="KIND",
        help="What weak steps are: a patch size (4, 2x4), exit:3 (after so many blocks), or scale:ratio=2,band=dct (a "
        "smaller grid, on any model, without training).  [default: the coarsest patch size]",
        show_default=False,
    ),
]
WeakLast = Annotated[
    bool, typer.Option("--weak-last", help="Weak steps at the end: the paper's baseline, not a good idea.")
]
PrecisionName = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="fp32, bf16, bf16-mixed, bf16-compiled or int8d. Default: bf16 where it is faster.",
        show_default=False,
    ),
]
SearchName = Annotated[
    str | None,
    typer.Option("--search", metavar="PLANNER", help="Search for the plan: auto, s3, oss, ...", show_default=False),
]
SearchTime = Annotated[
    str | None, typer.Option("--time", help="How long a search may take: 90s, 5min.", show_default=False)
]
