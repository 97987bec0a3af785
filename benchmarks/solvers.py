"""Time outside the network: Pliant's interpreter against diffusers' `scheduler.step` for the same solver.

    python benchmarks/solvers.py [--steps 20] [--shape 1,4,32,32 4,4,64,64] [--rounds 31] [--json solvers.json]
    python benchmarks/solvers.py --updates

Both loops call a network that returns one fixed tensor, so what is timed is only the solver: for diffusers
`scale_model_input` and `step`, for Pliant the loop of `run`. Preparing (set_timesteps, compile) is not timed there; the
second table times compiling a 1000-step program. Medians per step; the variants take turns within each round.

The last table (`--updates`) is one linear update of 2 to 6 terms on its own: the interpreter's way (the accumulator is
read and written once per term after the first) against walking the tensors in pieces that stay in the cache (the same
bits), and against torch.addr, the one kernel that scales and adds two tensors in one pass (other bits).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pliant.paths import get_path, uniform_times
from pliant.solvers import Output, compile_program, fused_combine, run
from pliant.solvers.interpreter import combine

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# Pliant's name, diffusers' scheduler, its options.
PAIRS: tuple[tuple[Any, str, dict[str, Any]], ...] = (
    ("ddim", "DDIMScheduler", {"clip_sample": False}),
    ("dpmpp-2m", "DPMSolverMultistepScheduler", {}),
    ("dpmpp-3m", "DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("sde-dpmpp-2m", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("dpmpp-2s-grid", "DPMSolverSinglestepScheduler", {}),
    ("unipc-2", "UniPCMultistepScheduler", {}),
    ("unipc-3", "UniPCMultistepScheduler", {"solver_order": 3}),
    ("deis-3", "DEISMultistepScheduler", {"solver_order": 3}),
    ("plms", "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    ("lms-4", "LMSDiscreteScheduler", {}),
    ("euler-edm", "EulerDiscreteScheduler", {}),
    ("heun-edm", "HeunDiscreteScheduler", {}),
    ("euler-ancestral", "EulerAncestralDiscreteScheduler", {}),
    ("euler", "FlowMatchEulerDiscreteScheduler", {}),
)


def ours(solver: Any, steps: int, shape: tuple[int, ...]) -> Callable[[], float]:
    """Seconds of one run."""
    flow = solver == "euler"
    path = get_path("linear") if flow else get_path("vp-discrete", betas="scaled-linear")
    program = compile_program(path, uniform_times(steps), solver, "velocity" if flow else "epsilon")
    program.last_uses()
    x, output = torch.randn(shape), Output(torch.randn(shape))

    def loop() -> float:
        begin = time.perf_counter()
        for _ in run(program, x, lambda state, ev: output, lambda slot: torch.randn(shape)):
            pass
        return time.perf_counter() - begin

    return loop


def theirs(name: str, options: dict[str, Any], steps: int, shape: tuple[int, ...]) -> Callable[[], float]:
    import diffusers

    warnings.simplefilter("ignore")
    scheduler = getattr(diffusers, name)(**({} if "Flow" in name else BETAS), **options)
    x, output = torch.randn(shape), torch.randn(shape)
    scale = getattr(scheduler, "scale_model_input", lambda state, t: state)

    def loop() -> float:
        scheduler.set_timesteps(steps)
        state = x
        begin = time.perf_counter()
        for t in scheduler.timesteps:
            scale(state, t)
            state = scheduler.step(output, t, state).prev_sample
        return time.perf_counter() - begin

    return loop


def measure(steps: int, shape: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    loops = [(s, ours(s, steps, shape), theirs(n, o, steps, shape)) for s, n, o in PAIRS]
    found: dict[Any, tuple[list[float], list[float]]] = {s: ([], []) for s, _, _ in loops}
    for _ in range(rounds):
        for solver, mine, other in loops:
            found[solver][0].append(mine())
            found[solver][1].append(other())
    rows = []
    for solver, (mine_s, other_s) in found.items():
        a, b = (1e6 * statistics.median(v) / steps for v in (mine_s, other_s))
        ratio = statistics.median(x / y for x, y in zip(mine_s, other_s, strict=True))
        rows.append({"solver": solver, "shape": shape, "pliant_us": a, "diffusers_us": b, "ratio": ratio})
    return rows


def compile_seconds(rounds: int = 3) -> list[dict[str, Any]]:
    """Compiling 1000 steps."""
    path, times, rows = get_path("vp-discrete"), uniform_times(1000, 0.999), []
    for solver in ("ddim", "dpmpp-3m", "unipc-3", "dpmpp-3s", "f-pndm", "rk4", "edm-churn", "dormand-prince-5"):
        seconds = []
        for _ in range(rounds):
            begin = time.process_time()
            compile_program(path, times, solver, "epsilon").last_uses()
            seconds.append(time.process_time() - begin)
        rows.append({"solver": solver, "compile_1000_s": min(seconds)})
    return rows


UPDATE_SHAPES = ((1, 4, 32, 32), (4, 4, 64, 64), (16, 4, 128, 128), (1, 16, 21, 90, 160))
PIECE = 1 << 17  # elements per thread: accumulator and one term fit 1 MiB of a core's cache


def in_pieces(terms: list[tuple[float, Tensor]], like: Tensor) -> Tensor:
    """`combine`, piece by piece; the bits are the same."""
    out = torch.empty_like(like)
    size = PIECE * torch.get_num_threads()
    pieces = [v.view(-1).split(size) for _, v in terms]
    (first, _), *rest = terms
    for k, piece in enumerate(out.view(-1).split(size)):
        torch.mul(pieces[0][k], first, out=piece)
        for j, (coefficient, _) in enumerate(rest, 1):
            piece.add_(pieces[j][k], alpha=coefficient)
    return out


def by_addr(terms: list[tuple[float, Tensor]], like: Tensor) -> Tensor:
    """`combine` with its first two terms in one pass."""
    (a, x), (b, y), *rest = terms
    one = torch.ones(1, dtype=x.dtype)
    out = torch.addr(x.view(-1, 1), y.view(-1), one, beta=a, alpha=b).view(x.shape)
    for coefficient, value in rest:
        out.add_(value, alpha=coefficient)
    return out


def updates(rounds: int) -> list[dict[str, Any]]:
    """One linear update, three ways: medians in microseconds and medians of the ratios to `combine`."""
    ways = {"combine": combine, "pieces": in_pieces, "addr": by_addr, "fused": fused_combine}
    rows = []
    for shape in UPDATE_SHAPES:
        for count in (2, 3, 4, 6):
            terms = [(0.3 + 0.1 * i, torch.randn(shape)) for i in range(count)]
            like = terms[0][1]
            if not torch.equal(combine(terms, like), in_pieces(terms, like)):
                raise SystemExit("pieces must not change a bit")
            repeats = max(1, 200_000 // like.numel())
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, way in ways.items():
                    begin = time.perf_counter()
                    for _ in range(repeats):
                        way(terms, like)
                    seconds[name].append((time.perf_counter() - begin) / repeats)
            row: dict[str, Any] = {"shape": shape, "terms": count, "threads": torch.get_num_threads()}
            row["combine_us"] = 1e6 * statistics.median(seconds["combine"])
            for name in ("pieces", "addr", "fused"):
                pairs = zip(seconds[name], seconds["combine"], strict=True)
                row[name] = statistics.median(a / b for a, b in pairs)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shape", nargs="+", default=["1,4,32,32", "4,4,64,64"])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--updates", action="store_true", help="only the table of single updates")
    parser.add_argument("--json", help="also write the numbers here")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    if options.updates:
        print(f"one update on {torch.get_num_threads()} thread(s); pieces and addr as ratios")
        print(f"{'shape':<22}{'terms':>6}{'combine us':>12}{'pieces':>8}{'addr':>8}")
        found = updates(options.rounds)
        for row in found:
            print(
                f"{row['shape']!s:<22}{row['terms']:>6}{row['combine_us']:>12.1f}{row['pieces']:>8.2f}{row['addr']:>8.2f}{row['fused']:>8.2f}"
            )
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump({"updates": found, "torch": torch.__version__}, file, indent=1)
        return
    rows = []
    for text in options.shape:
        shape = tuple(int(v) for v in text.split(","))
        print(f"\n{options.steps} steps, state {shape}: microseconds per step outside the network")
        print(f"{'solver':<18}{'pliant':>9}{'diffusers':>11}{'ratio':>8}")
        for row in measure(options.steps, shape, options.rounds):
            print(f"{row['solver']:<18}{row['pliant_us']:>9.1f}{row['diffusers_us']:>11.1f}{row['ratio']:>8.2f}")
            rows.append(row)
    print("\ncompiling 1000 steps, seconds of processor time")
    compiled = compile_seconds()
    for row in compiled:
        print(f"{row['solver']:<18}{row['compile_1000_s']:>9.3f}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"steps": rows, "compile": compiled, "torch": torch.__version__}, file, indent=1)


if __name__ == "__main__":
    main()
