"""One guided denoising step of a DiT against diffusers, on the same weights, interleaved in one run.

    python benchmarks/step.py [--model DiT-S/2] [--batch 1 4 16] [--rounds 7] [--json step.json]

Pliant's number is a whole step of `Sampler` (engine, guidance, solver); diffusers' is `DiTTransformer2DModel` on the
doubled batch plus its guidance line and its DDIM step, as its pipeline does it. Medians; every round runs all
variants in turn, so that a slow moment of the machine hits all of them. "rate" is the share of this machine's own
matrix-product rate (measured in the same rounds on the MLP's shapes) that the step's exact FLOPs reach.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

import pliant
from pliant.formats import load
from pliant.plans import Plan, Sampler


def diffusers_twin(name: str):  # type: ignore[no-untyped-def]
    """A random diffusers DiT and our denoiser with the same weights."""
    import tempfile

    from diffusers import DiTTransformer2DModel

    size = pliant.DiTConfig.named(name)
    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.width // size.heads,
        in_channels=4,
        out_channels=8,
        num_layers=size.depth,
        sample_size=32,
        patch_size=size.patch_size[0],
        num_embeds_ada_norm=1000,
    ).eval()
    for block in theirs.transformer_blocks[1:]:  # converted checkpoints repeat the same embedders in every block
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load(folder)
    return theirs, ours


def step_of_diffusers(theirs, batch: int, autocast: bool) -> Callable[[], torch.Tensor]:  # type: ignore[no-untyped-def]
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(50)
    x = torch.randn(batch, 4, 32, 32)
    labels = torch.cat([torch.arange(batch), torch.full((batch,), 1000)])
    t = scheduler.timesteps[10]

    @torch.no_grad()
    def step() -> torch.Tensor:
        double = torch.cat([x, x])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = theirs(double, timestep=t.expand(2 * batch), class_labels=labels).sample
        eps = out[:, :4].float()
        cond, uncond = eps.chunk(2)
        return scheduler.step(uncond + 1.5 * (cond - uncond), t, x).prev_sample

    return step


def step_of_pliant(ours: pliant.Denoiser, batch: int, precision: str, steps: int = 10) -> Callable[[], torch.Tensor]:
    """A whole run of `steps` steps, so that what is prepared once is paid once per run, as users pay it."""
    plan = Plan.uniform(ours, steps, "ddim", pliant.Compute(precision=precision), 1.5)  # type: ignore[arg-type]
    sampler = Sampler(ours, plan)
    labels, seeds = list(range(batch)), list(range(batch))
    return lambda: sampler(labels, seeds)


def matmul_rate(dtype: torch.dtype, rows: int, width: int) -> Callable[[], torch.Tensor]:
    a, w = torch.randn(rows, width, dtype=dtype), torch.randn(4 * width, width, dtype=dtype)
    return lambda: torch.nn.functional.linear(a, w)


def timed(run: Callable[[], torch.Tensor], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps of one timed run of Pliant")
    parser.add_argument("--json")
    args = parser.parse_args()
    theirs, ours = diffusers_twin(args.model)
    tokens, width, steps = ours.shape().tokens, ours.config.width, args.steps
    results = []
    print(f"{args.model}, guided step, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for batch in args.batch:
        flop = 2 * batch * ours.flops()
        runs = {
            "diffusers fp32": (step_of_diffusers(theirs, batch, False), 1, 1),
            "diffusers bf16 autocast": (step_of_diffusers(theirs, batch, True), 1, 1),
            "pliant fp32": (step_of_pliant(ours, batch, "fp32", steps), 1, steps),
            "pliant bf16": (step_of_pliant(ours, batch, "bf16", steps), 1, steps),
            "matmul fp32": (matmul_rate(torch.float32, 2 * batch * tokens, width), 5, 1),
            "matmul bf16": (matmul_rate(torch.bfloat16, 2 * batch * tokens, width), 5, 1),
        }
        with torch.inference_mode():
            for run, _, _ in runs.values():
                run()
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(args.rounds):
                for name, (run, repeats, per) in runs.items():
                    times[name].append(timed(run, repeats) / per)
        median = {name: statistics.median(values) for name, values in times.items()}
        product = 2 * (2 * batch * tokens) * width * 4 * width
        rate = {d: product / median[f"matmul {d}"] for d in ("fp32", "bf16")}
        row = {
            "batch": batch,
            **{f"{name} ms": 1e3 * median[name] for name in list(runs)[:4]},
            "fp32 ratio": median["pliant fp32"] / median["diffusers fp32"],
            "bf16 ratio": median["pliant bf16"] / median["diffusers bf16 autocast"],
            "default speed-up": median["diffusers fp32"] / median["pliant bf16"],
            "fp32 rate": flop / median["pliant fp32"] / rate["fp32"],
            "bf16 rate": flop / median["pliant bf16"] / rate["bf16"],
            "matmul GFLOP/s": {k: v / 1e9 for k, v in rate.items()},
        }
        results.append(row)
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"model": args.model, "threads": torch.get_num_threads(), "rows": results}, file, indent=2)


if __name__ == "__main__":
    main()
