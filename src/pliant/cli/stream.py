"""`pliant stream`: a folder of images or a video as an image-to-image stream (StreamDiffusion)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import options as opt
from pliant.cli.console import Advance, emit_json, note, progress
from pliant.errors import ConfigError, PliantError

if TYPE_CHECKING:
    from torch import Tensor

    from pliant.denoiser import Denoiser
    from pliant.plans import Plan
    from pliant.tasks.streaming import Stream, StreamGuidance
    from pliant.tasks.streaming.clips import Clip

STRENGTH, STEPS, SCALE = 0.6, 4, 1.2
INBOX, OUTBOX = 8, 8
"""Frames that wait before and behind the network where none may be lost."""

EXAMPLES = """\b
Examples:
  pliant stream digits frames/ -o out/ --class 3                     one PNG per frame, and stream.json
  pliant stream digits clip.gif -o out.gif --strength 0.5 --steps 2 --filter 0.98
  pliant stream digits frames/ -o out.gif --class 3 --guidance full --scale 1.5
  pliant stream digits clip.mp4 -o out.mp4                           videos: pip install av
  pliant stream digits frames/ -o out.gif --levels 0.7,0.4,0.2 --solver flow-stochastic   re-noising, as published
  pliant stream digits frames/ -o out.gif --live 30                  as from a camera: late frames are dropped
"""


def register(app: typer.Typer) -> None:
    app.command("stream", epilog=EXAMPLES)(stream)


def stream(
    model: opt.Model,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", help="Folder of images, GIF, animated WebP or PNG, or video.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="A folder (a PNG each), .gif, .webp, .apng, .mp4, .mov, .mkv or .webm.")
    ] = Path("stream.gif"),
    strength: Annotated[
        float | None,
        typer.Option("--strength", help=f"How much of a frame is replaced, up to 1.  [default: {STRENGTH}]"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help=f"Levels, evenly from the strength down.  [default: {STEPS}]")
    ] = None,
    levels: Annotated[
        str | None, typer.Option("--levels", help="The levels themselves, decreasing: 0.7,0.4,0.2.")
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            "--solver", help="Single-step: ddim, euler, ddpm, flow-stochastic (re-noising).  [default: ddim]"
        ),
    ] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="A plan file; replaces the four options above.")] = None,
    label: Annotated[
        str | None, typer.Option("--class", metavar="ID|NAME", help="Class id or name. Default: unconditional.")
    ] = None,
    guidance: Annotated[str, typer.Option("--guidance", help="none, self, onetime or full.")] = "none",
    scale: Annotated[
        float | None, typer.Option("--scale", help=f"How far guidance goes; 1 is none.  [default: {SCALE}]")
    ] = None,
    delta: Annotated[
        float | None, typer.Option("--delta", help="Moderates the virtual negative (self, onetime).  [default: 1]")
    ] = None,
    filter: Annotated[
        float | None,
        typer.Option("--filter", metavar="THRESHOLD", help="Skip frames this similar to the last one: 0.98."),
    ] = None,
    max_skip: Annotated[
        int | None, typer.Option("--max-skip", min=0, help="Longest run of skips, less one.  [default: 10]")
    ] = None,
    live: Annotated[
        float | None, typer.Option("--live", metavar="FPS", help="Frames arrive at this rate; late ones are dropped.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--fps", help="Of the written animation.  [default: the input's, or 10]")
    ] = None,
    zoom: Annotated[
        int | None, typer.Option("--zoom", min=1, help="Enlarge pixels. Default: small animations to 64.")
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option("--autoencoder", help="diffusers autoencoder (folder or id), for models of latents."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the noise that all frames share.")] = 0,
    precision: opt.PrecisionName = None,
    device: opt.Device = None,
    format: opt.Format = None,
    option: opt.LoadOptions = None,
    json: opt.JSON = False,
) -> None:
    """Turn frames into frames: image-to-image on a stream, all denoising levels in one call per frame."""
    for name, value in (("--live", live), ("--fps", rate)):
        if value is not None and not 0 < value < 1e6:
            raise ConfigError(f"{name} is a number of frames per second above 0, got {value:g}")
    from pliant.cli.labels import parse_class
    from pliant.cli.models import open_model
    from pliant.cli.planning import own_precision
    from pliant.tasks.streaming import SimilarityFilter, Stream, open_codec
    from pliant.tasks.streaming.clips import DEFAULT_RATE, check_target, open_clip, open_target

    if filter is None and max_skip is not None:
        raise ConfigError("--max-skip belongs to --filter: give a threshold too, e.g. --filter 0.98")
    chosen_filter = None if filter is None else SimilarityFilter(filter, 10 if max_skip is None else max_skip, seed)
    chosen_guidance = _guidance(guidance, scale, delta)
    check_target(out, source)
    opened = open_model(model, format, option, device)
    denoiser = opened.denoiser
    chosen = _plan(denoiser, plan, levels, strength, steps, solver, precision)
    number = None if label is None else parse_class(label, denoiser)
    codec = open_codec(denoiser, autoencoder)
    clip = open_clip(source, codec.frame_shape)
    flow = Stream(denoiser, chosen, number, chosen_guidance, chosen_filter, codec, seed)
    meter = Meter()
    try:
        with open_target(out, rate or clip.rate or DEFAULT_RATE, zoom) as target, progress("streaming") as advance:
            dropped = _run(flow, clip, target.show, meter, live, advance)
            report = {
                "out": str(out),
                "model": opened.name,
                "class": label,
                "levels": [level.node.t for level in flow.batch.levels],
                "solver": flow.batch.plan.steps[0].solver.name,
                "guidance": asdict(flow.batch.guidance),
                "filter": None if chosen_filter is None else asdict(chosen_filter),
                "seed": seed,
                "precision": precision or own_precision(denoiser),
                **asdict(flow.counts),
                "rows_per_call": flow.batch.rows,
                "shown": meter.shown,
                "dropped_frames": dropped[0],
                "dropped_outputs": dropped[1],
                "unreadable": clip.unreadable,
                "seconds": meter.seconds,
                "fps": meter.rate(flow.counts.frames),
                "network_fps": meter.network_rate,
                "latency_calls": flow.latency + 1,
                "latency_ms": meter.latency_ms,
            }
            target.complete(report)
    except OSError as error:
        raise PliantError(f"could not write {out}: {error.strerror or error}") from None
    for name in clip.unreadable:
        note(f"skipped {name}: not readable")
    if json:
        emit_json(report)
    else:
        _print(report)


@dataclass
class Meter:
    """The clock of a run. Latency: from a frame's arrival to its output, of processed frames."""

    begun: float | None = None
    ended: float = 0.0
    shown: int = 0
    busy: float = 0.0
    """Seconds spent computing."""
    latencies: list[float] = field(default_factory=list)
    _under_way: deque[float] = field(default_factory=deque)

    def computed(self, arrived: float, begun: float, ended: float, processed: bool, finished: int) -> None:
        """One frame went in (or none, at the end, with processed false) and `finished` processed ones came out."""
        self.begun = begun if self.begun is None else self.begun
        self.ended, self.busy = ended, self.busy + ended - begun
        if processed:
            self._under_way.append(arrived)
        for _ in range(min(finished, len(self._under_way))):
            self.latencies.append(ended - self._under_way.popleft())

    @property
    def seconds(self) -> float:
        return 0.0 if self.begun is None else self.ended - self.begun

    @property
    def network_rate(self) -> float | None:
        """Processed frames per second of computing alone."""
        return len(self.latencies) / self.busy if self.busy > 0 else None

    @property
    def latency_ms(self) -> dict[str, float] | None:
        if not self.latencies:
            return None
        ordered = sorted(self.latencies)
        return {
            "mean": 1000.0 * sum(ordered) / len(ordered),
            "p95": 1000.0 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        }

    def rate(self, frames: int) -> float | None:
        """Frames per second of the whole run."""
        return frames / self.seconds if self.seconds > 0 else None


def _run(
    flow: Stream, clip: Clip, show: Any, meter: Meter, live: float | None, advance: Advance
) -> tuple[int, int]:
    """Every frame through the stream; returns how many frames and outputs were dropped (none unless live)."""
    from pliant.tasks.streaming import DroppingMailbox, Mailbox, run_threads

    clock = time.perf_counter
    total = clip.total or 0

    def shown(frame: Tensor) -> None:
        show(frame)
        meter.shown += 1

    if live is None:
        inbox, outbox = Mailbox[Any](INBOX), Mailbox[Any](OUTBOX)
        work, finish = _file_work(flow, meter, clock)
        source: Any = clip
    else:
        from pliant.tasks.streaming import paced

        # The newest frame is the one to work on; a consumer that is slow gets the newest output.
        inbox, outbox = DroppingMailbox[Any](1), DroppingMailbox[Any](2)
        work, finish = _live_work(flow, meter, clock)
        source = ((clock(), frame) for frame in paced(clip, live))
    done = 0

    def counted(item: Any) -> list[Tensor]:
        nonlocal done
        done += 1
        advance(done + inbox.dropped, max(total, done + inbox.dropped))
        return work(item)

    run_threads(source, counted, finish, shown, inbox, outbox)
    return inbox.dropped, outbox.dropped


def _file_work(flow: Stream, meter: Meter, clock: Any) -> Any:
    """Files: an output for every frame, in order."""
    from pliant.tasks.streaming import Aligned

    aligned = Aligned(flow)

    def work(frame: Tensor) -> list[Tensor]:
        processed, finished, begun = flow.counts.processed, aligned.finished, clock()
        found = aligned.add(frame)
        meter.computed(begun, begun, clock(), flow.counts.processed > processed, aligned.finished - finished)
        return found

    def finish() -> Iterator[Tensor]:
        finished, begun = aligned.finished, clock()
        found = aligned.finish()
        meter.computed(begun, begun, clock(), False, aligned.finished - finished)
        yield from found

    return work, finish


def _live_work(flow: Stream, meter: Meter, clock: Any) -> Any:
    """Live: what is finished is shown; nothing is repeated, and the processor rests while frames are skipped."""
    from pliant.tasks.streaming import Pace

    pace = Pace()

    def work(item: tuple[float, Tensor]) -> list[Tensor]:
        nonlocal pace
        arrived, frame = item
        begun = clock()
        tick = flow.offer(frame)
        ended = clock()
        meter.computed(arrived, begun, ended, not tick.skipped, int(tick.output is not None))
        if tick.skipped:
            time.sleep(pace.seconds or 0.0)
        else:
            pace = pace.after(ended - begun)
        return [] if tick.output is None else [tick.output]

    def finish() -> Iterator[Tensor]:
        outputs, begun = flow.flush(), clock()
        while (output := next(outputs, None)) is not None:
            meter.computed(begun, begun, clock(), False, 1)
            yield output
            begun = clock()

    return work, finish


def _guidance(negative: str, scale: float | None, delta: float | None) -> StreamGuidance:
    from pliant.tasks.streaming import StreamGuidance

    for name, value in (("--scale", scale), ("--delta", delta)):
        if negative == "none" and value is not None:
            raise ConfigError(f"{name} belongs to guidance: give --guidance self, onetime or full too")
    kind: Any = negative  # checked by StreamGuidance, which names the known ones
    return StreamGuidance(kind, SCALE if scale is None else scale, 1.0 if delta is None else delta)


def _plan(
    model: Denoiser,
    file: Path | None,
    levels: str | None,
    strength: float | None,
    steps: int | None,
    solver: str | None,
    precision: str | None,
) -> Plan:
    """The plan file, or a plan through the levels. Raises PliantError."""
    from pliant.cli.planning import solver_config, with_precision
    from pliant.plans import Plan
    from pliant.tasks.streaming import FOLLOW, even_levels, levels_plan

    typed = {"--levels": levels, "--strength": strength, "--steps": steps, "--solver": solver}
    given = [name for name, value in typed.items() if value is not None]
    if file is not None:
        if given or precision:
            raise ConfigError(f"a plan file decides everything: leave out {[*given, '--precision'][0]}, or --plan")
        return Plan.load(file)
    if levels is not None:
        if strength is not None or steps is not None:
            raise ConfigError("give either --levels, or --strength and --steps")
        times = _numbers(levels)
    else:
        times = even_levels(STRENGTH if strength is None else strength, STEPS if steps is None else steps)
    plan = levels_plan(model, times, solver_config(solver or FOLLOW))
    return plan if precision is None else with_precision(plan, precision)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"cannot read the levels {text!r}; write numbers with commas, e.g. 0.7,0.4,0.2") from None


def _print(report: dict[str, Any]) -> None:
    frames = f"{report['frames']} frames"
    extra = [
        f"{report[key]} {word}"
        for key, word in (
            ("skipped", "skipped as similar"),
            ("dropped_frames", "dropped before the network"),
            ("dropped_outputs", "dropped after it"),
        )
        if report[key]
    ]
    extra += [f"{len(report['unreadable'])} unreadable"] if report["unreadable"] else []
    rate = "" if report["fps"] is None else f", {report['fps']:.1f} frames per second"
    print(f"{report['out']}: {frames}{''.join(', ' + e for e in extra)}; {report['seconds']:.2f} s{rate}")
    latency = report["latency_ms"]
    took = "" if latency is None else f" ({latency['mean']:.1f} ms)"
    print(
        f"{report['network_calls']} network calls of up to {report['rows_per_call']} rows; an output leaves "
        f"{report['latency_calls']} calls after its frame came{took}"
    )
