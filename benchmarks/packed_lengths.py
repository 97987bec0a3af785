"""Images of many sizes through the native backbone: packed against padded, training and inference, interleaved.

    python benchmarks/packed_lengths.py [--data clothing-192px.parquet] [--device cuda] [--flex] [--json OUT]

The sizes are those of real photos (nothing cropped, FiTv2's resize rule, 16 pixels per token), in two mixes:
"as they are": every photo within 192x192 pixels; "mixed resolutions": every photo within 96x96, 128x128 or 192x192,
drawn at random, as in training stages that mix resolutions. Batches are drawn at random (not sorted by size), 24 images.

- packed: `FlexibleTransformer.forward_packed`: one product per linear over all tokens, attention size by size.
- padded: every image padded to the longest of its batch, attention masked, PyTorch's fused attention; the same weights,
  the same blocks' parts.
- padded, our attention: the same with `kernels.attention`, which is another one in bf16 training on CPUs.
- sampler's packs: what training really uses (`Packs`): a token budget filled size by size. As many images, others.
- one by one (`--alone`): a call per image.

Attention alone (`--attention`), on the same batches: by size (ours), one masked row, `torch.nested`, FlexAttention where it runs.
Seconds of processor time (one thread) per 100,000 tokens of images (padding not counted), medians; ratios to packed: median [least, most] of the rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.models import kernels
from pliant.models.flexible import FlexibleConfig, FlexibleTransformer
from pliant.models.layers import modulated_norm
from pliant.models.rope import apply_rope
from pliant.models.rotary import EPS
from pliant.training.data.packs import Packs
from pliant.training.data.sizes import fitted_size

UNIT = 16  # image pixels per token side: an autoencoder of 8 and patches of 2
IMAGES = 24


def photo_sizes(file: Path) -> list[tuple[int, int]]:
    """(height, width) of every image of a Parquet file."""
    import pyarrow.parquet as parquet
    from PIL import Image

    cells = parquet.read_table(file, columns=["image"]).column("image").to_pylist()
    images = [Image.open(io.BytesIO(cell["bytes"])) for cell in cells]
    return [(image.height, image.width) for image in images]


def mixes(photos: list[tuple[int, int]]) -> dict[str, list[tuple[int, int]]]:
    """Latent sizes of every photo, by the name of the mix."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.tensor([96, 128, 192])[torch.randint(3, (len(photos),), generator=generator)].tolist()

    def latent(photo: tuple[int, int], side: int) -> tuple[int, int]:
        height, width = fitted_size(*photo, side, UNIT)
        return height // 8, width // 8

    return {
        "as they are": [latent(p, 192) for p in photos],
        "mixed resolutions": [latent(p, s) for p, s in zip(photos, sides, strict=True)],
    }


class Batch:
    """States of some sizes, with times and labels in both orders."""

    def __init__(self, sizes: list[tuple[int, int]], channels: int, device: torch.device) -> None:
        ordered = sorted(sizes)
        self.groups = [torch.randn(ordered.count(s), channels, *s, device=device) for s in sorted(set(ordered))]
        self.t = torch.rand(len(sizes), device=device) * 1000
        self.y = torch.arange(len(sizes), device=device) % 10

    def __len__(self) -> int:
        return len(self.t)

    @property
    def tokens(self) -> int:
        """At patches of 2x2."""
        return sum(len(x) * x[0, 0].numel() // 4 for x in self.groups)


Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def padded(network: FlexibleTransformer, batch: Batch, attend: Attend = fused) -> list[Tensor]:
    """The usual way: one row per image, padded to the longest, padding masked out of attention."""
    mode, rows = network.mode(None), network.modulations(batch.t, batch.y)
    tokens = [mode.embed(x) for x in batch.groups]
    ropes = [network.rope(tuple(x.shape[2:]), mode.patch, "none", x.device) for x in batch.groups]
    longest = max(tok.shape[1] for tok in tokens)
    x = torch.cat([F.pad(tok, (0, 0, 0, longest - tok.shape[1])) for tok in tokens])
    cos, sin = (
        torch.cat([F.pad(r[k], (0, 0, 0, longest - len(r[k]))).expand(len(g), 1, -1, -1)
                   for r, g in zip(ropes, batch.groups, strict=True)])
        for k in (0, 1)
    )  # fmt: skip
    lengths = torch.cat([torch.full((len(tok),), tok.shape[1], device=x.device) for tok in tokens])
    mask = (torch.arange(longest, device=x.device) < lengths[:, None])[:, None, None]
    for i, block in enumerate(network.blocks):
        m: Any = rows[:, 6 * i : 6 * i + 6]
        qkv = block.qkv(modulated_norm(x, m[:, 0], m[:, 1], EPS))  # type: ignore[operator]
        q, k, v = qkv.view(*x.shape[:2], 3, block.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (apply_rope(F.layer_norm(u, u.shape[-1:], eps=EPS), cos, sin) for u in (q, k))
        out = attend(q, k, v, mask).transpose(1, 2).flatten(2)
        x = torch.addcmul(x, m[:, 2, None], block.proj(out))  # type: ignore[operator]
        x = torch.addcmul(x, m[:, 5, None], block.mlp(modulated_norm(x, m[:, 3], m[:, 4], EPS)))  # type: ignore[operator]
    counts = [len(g) for g in batch.groups]
    parts = zip(x.split(counts), rows.split(counts), batch.groups, tokens, strict=True)
    return [network.read(p[:, : tok.shape[1]], m, tuple(g.shape[2:])) for p, m, g, tok in parts]


def packed(network: FlexibleTransformer, batch: Batch) -> list[Tensor]:
    return network.forward_packed(batch.groups, batch.t, batch.y)


def one_by_one(network: FlexibleTransformer, batch: Batch) -> list[Tensor]:
    outs, at = [], 0
    for group in batch.groups:
        for x in group:
            outs.append(network(x[None], batch.t[at : at + 1], batch.y[at : at + 1]))
            at += 1
    return outs


def attentions(heads: int, lengths: list[int], device: torch.device, flex: bool) -> dict[str, Callable[[], Any]]:
    """Ways to attend within sequences of these lengths, on equal random queries, keys and values of width 64."""
    q, k, v = (torch.randn(sum(lengths), heads, 64, device=device) for _ in range(3))
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device))
    bounds = [slice(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths))]
    runs: list[list[slice]] = []
    for length, bound in zip(lengths, bounds, strict=True):
        if runs and runs[-1][0].stop - runs[-1][0].start == length:
            runs[-1].append(bound)
        else:
            runs.append([bound])

    def by_size() -> list[Tensor]:
        outs = []
        for group in runs:
            whole = slice(group[0].start, group[-1].stop)
            parts = [u[whole].view(len(group), -1, heads, 64).transpose(1, 2) for u in (q, k, v)]
            outs.append(F.scaled_dot_product_attention(*parts))
        return outs

    def masked() -> Tensor:
        mask = owner[:, None] == owner[None]
        rows = [u.transpose(0, 1)[None] for u in (q, k, v)]
        return F.scaled_dot_product_attention(*rows, attn_mask=mask)

    def nested() -> Tensor:
        offsets = torch.tensor([0, *(b.stop for b in bounds)], device=device)
        jagged = [torch.nested.nested_tensor_from_jagged(u, offsets).transpose(1, 2) for u in (q, k, v)]
        return F.scaled_dot_product_attention(*jagged)

    ways: dict[str, Callable[[], Any]] = {"by size": by_size, "one masked row": masked, "torch.nested": nested}
    if not flex:  # compiles for a minute on a CPU
        return ways
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        total = sum(lengths)
        block = create_block_mask(lambda b, h, i, j: owner[i] == owner[j], None, None, total, total, device=str(device))
        compiled = torch.compile(flex_attention)
        rows = [u.transpose(0, 1)[None] for u in (q, k, v)]
        ways["FlexAttention, compiled"] = lambda: compiled(*rows, block_mask=block)
    except ImportError:
        pass
    return ways


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(ways: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float] | None]:
    """Seconds of each in every round, interleaved; None for what does not run here."""
    seconds: dict[str, list[float] | None] = {name: [] for name in ways}
    for round_ in range(rounds + 1):  # the first warms up
        for name, way in ways.items():
            taken = seconds[name]
            if taken is None:
                continue
            start = clock(device)
            try:
                way()
            except Exception as error:  # backends refuse in many ways
                print(f"  {name} does not run here: {(str(error).splitlines() or ['?'])[0][:90]}")
                seconds[name] = None
                continue
            if round_:
                taken.append(clock(device) - start)
    return seconds


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/clothing-192px.parquet"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast")
    parser.add_argument("--attention", action="store_true", help="time attention alone too")
    parser.add_argument("--alone", action="store_true", help="time a call per image too")
    parser.add_argument("--flex", action="store_true", help="time FlexAttention too, which compiles first")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    config = FlexibleConfig(
        input_size=(24, 24), patch_sizes=((2, 2),), in_channels=32, width=args.width, depth=args.depth,
        heads=args.width // 64, num_classes=10,
    )  # fmt: skip
    network = FlexibleTransformer(config).to(device)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.02)
    report: dict[str, Any] = {"torch": str(torch.__version__), "depth": args.depth, "width": args.width, "mixes": {}}
    for name, sizes in mixes(photo_sizes(args.data)).items():
        order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(1)).tolist()
        drawn = [[sizes[i] for i in order[b * IMAGES : (b + 1) * IMAGES]] for b in range(args.batches)]
        batches = [Batch(part, config.in_channels, device) for part in drawn]
        lengths = [[h * w // 4 for h, w in part] for part in drawn]
        waste = sum(len(n) * max(n) for n in lengths) / sum(map(sum, lengths))
        with torch.no_grad():
            ours, theirs = packed(network, batches[0]), padded(network, batches[0])
            alone = torch.cat([o.flatten() for o in one_by_one(network, batches[0])])
            off = max(
                float((torch.cat([o.flatten() for o in outs]) - alone).abs().max()) for outs in (ours, theirs)
            )
        print(f"{name}: {len(set(sizes))} sizes, padding multiplies tokens by {waste:.2f}, outputs differ by {off:.1e}")
        found: dict[str, Any] = {"padding": waste, "difference": off}
        tokens = torch.tensor([h * w // 4 for h, w in sizes])
        budget = IMAGES * int(tokens.float().mean())
        packs = Packs(torch.tensor(sizes), tokens, budget, seed=0)
        members = [packs.members(k) for k in range(20)]
        sampled = [Batch([sizes[i] for i in m], config.in_channels, device) for m in members[: 2 * args.batches]]
        for what in ("inference", "training"):
            ways: dict[str, Callable[[], Any]] = {}
            real: dict[str, int] = {}
            own = partial(padded, attend=kernels.attention)
            choices: list[tuple[str, Any, list[Batch]]] = [
                ("packed", packed, batches), ("padded", padded, batches), ("padded, our attention", own, batches),
                ("sampler's packs", packed, sampled),
            ]  # fmt: skip
            for label, way, given in [*choices, *([("one by one", one_by_one, batches)] if args.alone else [])]:

                def call(way: Any = way, what: str = what, given: list[Batch] = given) -> None:
                    for batch in given:
                        with torch.set_grad_enabled(what == "training"), torch.autocast(
                            device.type, torch.bfloat16, enabled=args.precision == "bf16"
                        ):
                            outs = way(network, batch)
                        if what == "training":
                            torch.cat([o.float().flatten() for o in outs]).square().mean().backward()  # type: ignore[no-untyped-call]

                ways[label], real[label] = call, sum(batch.tokens for batch in given)
            rounds = timed(ways, args.rounds, device)
            per = {k: [1e5 * s / real[k] for s in v] for k, v in rounds.items() if v is not None}
            print(f"  {what}, seconds per 100,000 tokens: " + ", ".join(
                f"{k} {statistics.median(v):.1f}" for k, v in per.items()))  # fmt: skip
            ratios = {k: [a / b for a, b in zip(v, per["packed"], strict=True)] for k, v in per.items() if k != "packed"}
            print("    over packed: " + ", ".join(f"{k} {spread(v)}" for k, v in ratios.items()))
            found[what] = {"per_100000_tokens": per, "ratios": ratios}
        fill = sum(int(tokens[m].sum()) for m in members) / (20 * budget)
        kinds = sum(len({sizes[i] for i in m}) for m in members) / 20
        print(f"  packs of {budget} tokens: {fill:.1%} full, {kinds:.1f} sizes in each")
        found["packs"] = {"budget": budget, "fill": fill, "sizes": kinds}
        if not args.attention:
            report["mixes"][name] = found
            continue
        with torch.no_grad():
            each = timed(attentions(args.width // 64, sorted(lengths[0]), device, args.flex), args.rounds, device)
        alone_ = {k: None if v is None else statistics.median(v) for k, v in each.items()}
        print("  attention alone: " + ", ".join(f"{k} {1e3 * v:.1f} ms" for k, v in alone_.items() if v is not None))
        found["attention_seconds"] = alone_
        report["mixes"][name] = found
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
