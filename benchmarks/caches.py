"""Pliant's cache executor against diffusers' own hooks and cache-dit: one run, the same weights, interleaved.

    pip install --no-deps --target /tmp/cache-dit cache-dit        # a folder of its own; optional
    OMP_NUM_THREADS=1 python benchmarks/caches.py [--rounds 9] [--steps 20] [--cache-dit /tmp/cache-dit]
    OMP_NUM_THREADS=1 python benchmarks/caches.py --part overhead

Overhead: the program "all sites run" against the plain block loop, batch 1, Pliant's DiT-S/2 and diffusers'. Peers: a
request of DDIM steps on diffusers' DiT-S/2 (random weights that hide nothing, batch 1, no guidance); each
on modules of its own around the same weights, with the same rule and the same numbers. Applying a peer's hooks and
making our schedule (once for many requests) is not timed; resetting hooks and making a request's `SiteTransformer` is.
Every round runs all rows once, in turn; ratios are taken within a round, then their median. With one thread, seconds are the process's CPU seconds (a busy machine then matters less).
"gap" is the largest difference of the last latents over their spread; "full" the steps that ran every block. Hooks that
keep their decisions to themselves are asked by counting how often a middle block's MLP really ran.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

LABEL = torch.tensor([207])
Run = Callable[[], Tensor]


def weights(net: Any) -> Any:
    """Random weights of normal size everywhere; zero-initialised gates would make every cache exact."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            scale = 0.5 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.02
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return net.eval().requires_grad_(False)


def clock() -> float:
    """With one thread the processor's seconds are the calculation's own, whatever else the machine does."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(rows: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds per row and round, interleaved, every other round backwards; one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for round_ in range(rounds + 1):
        for name, call in list(rows.items())[:: 1 if round_ % 2 else -1]:
            began = clock()
            call()
            if round_:
                seconds[name].append(clock() - began)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Median of the rounds' ratios and its 90 % interval by order statistics (of less than 5 rounds: all there are)."""
    found = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    n = len(found)
    below = 0  # as many ratios lie outside at either end as a fair coin shows heads with a chance of up to 5 %
    while sum(math.comb(n, k) for k in range(below + 1)) <= 0.05 * 2**n:
        below += 1
    return statistics.median(found), found[max(0, below - 1)], found[n - max(1, below)]


def overhead(rounds: int) -> list[dict[str, Any]]:
    """The all-R program against the plain loop."""
    from pliant.compute import Cache, Compute, Moment
    from pliant.compute.executor import Call
    from pliant.compute.lowering import lower
    from pliant.integrations import SiteTransformer
    from pliant.models import DiT, DiTConfig
    from pliant.models.dit_sites import DiTSites

    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    ours = weights(DiT(DiTConfig(input_size=(32, 32), patch_size=(2, 2), in_channels=4, width=384, depth=12, heads=6)))
    theirs, t = diffusers_dit(), torch.tensor([500])
    modulations = ours.modulations(torch.tensor([500.0]), LABEL)
    sites = DiTSites(ours)
    program = lower(Compute(sites="R24"), 24)

    def executed() -> Tensor:
        return Call(program, sites, Cache(), "net", ("cond",), Moment(0, 0.5, 0.0))(x, modulations)

    always = SiteTransformer(theirs, [Compute(sites="R24")])
    found = timed(
        {
            "pliant loop": lambda: ours.forward_modulated(x, modulations),
            "pliant executor": executed,
            "diffusers loop": lambda: theirs(x, timestep=t, class_labels=LABEL),
            "diffusers executor": lambda: always(x, timestep=t, class_labels=LABEL),
        },
        rounds * 10,
    )
    rows = []
    for name in ("pliant", "diffusers"):
        plain, program_s = found[f"{name} loop"], found[f"{name} executor"]
        middle, low, high = ratio(program_s, plain)
        rows.append({
            "what": f"all sites, {name} DiT-S/2", "plain_s": statistics.median(plain), "ratio": middle,
            "executor_s": statistics.median(program_s), "interval": [low, high],
        })  # fmt: skip
        print(
            f"{rows[-1]['what']:34} plain {rows[-1]['plain_s'] * 1e3:7.2f} ms   executor "
            f"{rows[-1]['executor_s'] * 1e3:7.2f} ms   {100 * middle - 100:+.1f} % [{100 * low - 100:+.1f}, "
            f"{100 * high - 100:+.1f}]", flush=True
        )  # fmt: skip
    return rows


def diffusers_dit(side: int = 32) -> Any:
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=12, sample_size=side,
        patch_size=2,
    )  # fmt: skip
    weights(net)
    with torch.no_grad():  # trained networks change little per step; these would forget the last one
        for block in net.transformer_blocks:
            block.norm1.emb.timestep_embedder.linear_1.weight.mul_(0.05)
    return net


class Request:
    """DDIM on one starting noise."""

    def __init__(self, steps: int, side: int = 32) -> None:
        from diffusers import DDIMScheduler

        self.scheduler = DDIMScheduler(clip_sample=False)
        self.scheduler.set_timesteps(steps)
        self.start = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1))
        self.times = [float(t) / 1000 for t in self.scheduler.timesteps]
        self.now = 0

    def __call__(self, network: Any) -> Tensor:
        x = self.start
        for t in self.scheduler.timesteps:
            self.now = int(t)
            out = network(x, timestep=t[None], class_labels=LABEL).sample[:, :4]
            x = self.scheduler.step(out, t, x).prev_sample
        return x


def with_same_weights(net: Any) -> Any:
    """Modules of their own, for hooks, around the very same tensors: where weights lie in memory makes up to 5 % of a
    linear layer's time."""
    tensors = [*net.parameters(), *net.buffers()]
    return copy.deepcopy(net, {id(tensor): tensor for tensor in tensors})


def hooked(net: Any, request: Request, apply: Callable[[Any], None]) -> Run:
    """A request on a copy with diffusers' hooks, which are reset first."""
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    own = with_same_weights(net)
    apply(own)

    def run() -> Tensor:
        HookRegistry.check_if_exists_or_initialize(own).reset_stateful_hooks()
        for module in own.modules():  # hooks on inner modules (PAB) that the root does not list
            if hasattr(module, "_diffusers_hook"):
                module._diffusers_hook.reset_stateful_hooks(recurse=False)
        _set_cache_context(own, CacheContext("cond"))
        return request(own)

    run.network = own  # type: ignore[attr-defined]
    return run


def usual_change(net: Any, request: Request, blocks: int, factor: float) -> float:
    """A threshold that matters for these weights: so many times the median change, per step, of what the first blocks
    add to the tokens.
    """
    from pliant.integrations import sites_of

    sites, kept, changes = sites_of(net), [], []

    def network(x: Tensor, **inputs: Any) -> Any:
        state, context = sites.begin(x, {**inputs, "cross_attention_kwargs": None})
        kept.append(sites.run(0, sites.starts[blocks], state, context)[0] - state[0])
        return net(x, **inputs)

    request(network)
    for before, now in pairwise(kept):
        changes.append(float((now - before).abs().mean() / before.abs().mean()))
    return min(0.95, round(factor * statistics.median(changes), 4))


def pairs(net: Any, request: Request, steps: int) -> dict[str, tuple[str, dict[str, Any], Run]]:
    """By name: our preset and its options, and the peer's request."""
    from diffusers import hooks

    ratios = [1.0] + [1 + 0.04 * ((7 * i) % 5 - 2) / 2 for i in range(1, steps)]
    attention_mlp = [r"transformer_blocks\.\d+\.(attn1|ff)"]
    taylor = hooks.TaylorSeerCacheConfig(
        cache_interval=4, disable_cache_before_step=3, max_order=1, taylor_factors_dtype=torch.float32,
        cache_identifiers=attention_mlp,
    )  # fmt: skip
    pab = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: request.now,
    )  # fmt: skip
    mag = hooks.MagCacheConfig(threshold=0.06, max_skip_steps=3, num_inference_steps=steps, mag_ratios=ratios)
    found: dict[str, tuple[str, dict[str, Any], Run]] = {}
    for factor in (1.0, 2.0, 4.0):
        threshold = usual_change(net, request, 1, factor)
        config = hooks.FirstBlockCacheConfig(threshold=threshold)
        run = hooked(net, request, lambda n, c=config: hooks.apply_first_block_cache(n, c))
        found[f"diffusers FirstBlockCache {threshold:g}"] = ("fbc", {"threshold": threshold}, run)
    found["diffusers TaylorSeer every 4"] = (
        "taylorseer-diffusers",
        {"interval": 4, "warmup": 3, "order": 1, "basis": "taylor"},
        hooked(net, request, lambda n: hooks.apply_taylorseer_cache(n, taylor)),
    )
    found["diffusers MagCache 0.06"] = (
        "magcache",
        {"ratios": ratios, "threshold": 0.06, "max_run": 3},
        hooked(net, request, lambda n: hooks.apply_mag_cache(n, mag)),
    )
    found["diffusers PAB 2"] = (
        "pab",
        {"attention": 2, "low": 0.1, "high": 0.8},
        hooked(net, request, lambda n: hooks.apply_pyramid_attention_broadcast(n, pab)),
    )
    return found


def cache_dit_pairs(net: Any, request: Request, steps: int) -> dict[str, tuple[str, dict[str, Any], Run]]:
    """The same of cache-dit's DBCache. Raises ImportError where it is not installed."""
    import logging

    import cache_dit

    logging.getLogger("CACHE_DIT").setLevel(logging.WARNING)
    found: dict[str, tuple[str, dict[str, Any], Run]] = {}
    for factor, front, back in ((2.0, 1, 0), (2.0, 4, 0), (4.0, 2, 2)):
        threshold = usual_change(net, request, front, factor)
        own = with_same_weights(net)
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=front, Bn_compute_blocks=back, residual_diff_threshold=threshold, max_warmup_steps=3,
            num_inference_steps=steps,
        )  # fmt: skip
        adapter = cache_dit.BlockAdapter(
            transformer=own, blocks=own.transformer_blocks, forward_pattern=cache_dit.ForwardPattern.Pattern_3,
            patch_functor=_dit_functor(),
        )  # fmt: skip
        cache_dit.enable_cache(adapter, cache_config=config)

        def run(own: Any = own) -> Tensor:
            return request(own)

        run.network = own  # type: ignore[attr-defined]
        options = {"threshold": threshold, "front": front, "back": back, "warmup": 3}
        found[f"cache-dit DBCache F{front}B{back} {threshold:g}"] = ("dbcache", options, run)
    return found


def _dit_functor() -> Any:
    from cache_dit.caching.patch_functors import DiTPatchFunctor

    return DiTPatchFunctor()


def full_steps(middle: Any, run: Run) -> tuple[Tensor, int]:
    """The answer, and how often a middle block's MLP really ran."""
    count = [0]
    handle = middle.ff.net[0].register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    try:
        return run(), count[0]
    finally:
        handle.remove()


def peers(steps: int, rounds: int, folder: str | None, side: int, only: list[str]) -> list[dict[str, Any]]:
    from pliant.compute import Compute
    from pliant.integrations import SiteTransformer, sites_of
    from pliant.integrations.sites.schedule import cache_schedule

    net, request = diffusers_dit(side), Request(steps, side)
    found = pairs(net, request, steps)
    if folder:
        sys.path.append(folder)
    try:
        found |= cache_dit_pairs(net, request, steps)
    except ImportError as error:
        print(f"cache-dit is not here ({error}); see --cache-dit", file=sys.stderr)
    found = {name: pair for name, pair in found.items() if not only or any(word in name for word in only)}
    plain = request(net)
    runs: dict[str, Run] = {}
    checks: dict[str, dict[str, Any]] = {}
    for name, (preset, options, theirs) in found.items():

        own = with_same_weights(net)
        schedule = cache_schedule(sites_of(own), request.times, preset, **options)

        def ours(own: Any = own, schedule: list[Compute] = schedule) -> Tensor:
            return request(SiteTransformer(own, schedule))

        runs[name], runs[f"pliant {name}"] = theirs, ours
        peer: Any = theirs
        want, their_full = full_steps(_block(peer.network), theirs)
        got, our_full = full_steps(_block(own), ours)
        checks[name] = {
            "gap": float((got - want).abs().max() / want.std()),
            "full": our_full,
            "peer_full": their_full,
            "effect": float((want - plain).abs().max() / plain.std()),
        }
    rows: list[dict[str, Any]] = []
    for name, check in checks.items():
        pair = timed({"peer": runs[name], "ours": runs[f"pliant {name}"], "plain": lambda: request(net)}, rounds)
        middle, low, high = ratio(pair["ours"], pair["peer"])
        share = ratio(pair["ours"], pair["plain"])[0]
        rows.append({
            "what": name, "peer_s": statistics.median(pair["peer"]), "seconds": statistics.median(pair["ours"]),
            "ratio": middle, "interval": [low, high], "of_plain": share, **check,
        })  # fmt: skip
        print(
            f"{name:34} {rows[-1]['peer_s']:7.3f} s   pliant {rows[-1]['seconds']:7.3f} s   {middle:5.3f}x [{low:.3f}, "
            f"{high:.3f}]   {share:.0%} of plain   full {check['peer_full']:2d} and {check['full']:2d}   gap "
            f"{check['gap']:.1e}   effect of the cache {check['effect']:.1e}", flush=True
        )  # fmt: skip
    return rows


def _block(network: Any) -> Any:
    """The seventh block, behind cache-dit's wrapper where there is one."""
    found = [m for m in network.modules() if type(m).__name__ == "BasicTransformerBlock"]
    return found[6]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[], help="peers whose name has one of these words")
    parser.add_argument("--side", type=int, default=32, help="of the peers' latents: smaller ones show overheads")
    parser.add_argument("--cache-dit", help="folder that pip installed cache-dit into")
    parser.add_argument("--part", choices=["overhead", "peers"], help="only this")
    parser.add_argument("--json", help="also write the rows here")
    args = parser.parse_args()
    with torch.no_grad():
        rows = [] if args.part == "peers" else overhead(args.rounds)
        rows += [] if args.part == "overhead" else peers(args.steps, args.rounds, args.cache_dit, args.side, args.only)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
