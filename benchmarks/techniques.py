"""Every technique that makes a call cheaper, at three strengths: FLOPs, seconds and distance, against fewer steps.

    OMP_NUM_THREADS=1 python benchmarks/techniques.py --resume
    OMP_NUM_THREADS=1 python benchmarks/techniques.py --cifar-size
    OMP_NUM_THREADS=1 python benchmarks/techniques.py --part cifar --model runs/cifar-p4/model --num 200 --strengths 1 \
        --extractor cifar10-classifier --reference ../shared/data/cifar10-train.parquet --plot docs/images/cifar.png

The table: on the shipped digits model, every row is compared with the plain plan (50 steps of dpmpp-2m; guided rows with
the guided one) and with fewer full steps that cost no more FLOPs than the row, on the same seeds. FLOPs are exact; a
gated row's are those of the decisions that its gates took. The distance is Fréchet's in a classifier's features,
mean and standard deviation over sets of seeds; "off" is the root mean square distance to the plain plan's images of the
same seeds. Seconds: all rows take turns in every round, the share is taken within a round, medians.

A row is "better" or "worse" than fewer steps if it is so, by more than 5 %, on every set of seeds; else "level".

--cifar-size: seconds share against FLOPs share on an untrained DiT for 32x32 (patch 2, width 384, depth 12, batch 4),
where arithmetic dominates; nothing is said about quality. With one thread, seconds are the process's CPU seconds.
Finished rows are kept in the output file after each; --resume goes on where a run was interrupted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from technique_catalogue import Bench, Case, Made, catalogue
from torch import nn

import pliant
from pliant import Denoiser
from pliant.adapters.flexify import flexify
from pliant.evaluation import evaluate, get_extractor, load_reference
from pliant.files import write_json
from pliant.models import DiT, DiTConfig
from pliant.paths import NetworkTime, get_path
from pliant.plans import Sampler

MARGIN = 0.05
"""Of the distance of fewer steps, for a verdict."""


def machine() -> dict[str, Any]:
    """Where and when."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(), "cores": len(names), "threads": torch.get_num_threads(),
        "clock": "process CPU time" if torch.get_num_threads() == 1 else "wall clock", "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def clock() -> float:
    """With one thread the processor's seconds are the calculation's own, whatever else the machine does."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def fewer_steps(bench: Bench, flops: float, guided: bool) -> int:
    """The most full steps that cost no more than `flops` (half a percent more is no more); above 20 multiples of 5."""
    once = bench.full(guided=guided).cost(bench.model).flops / bench.steps
    most = max(1, int(flops / once + 0.005 * bench.steps))
    return min(bench.steps, most if most <= 20 else most - most % 5)


class Table:
    """The digits table: measured rows by key, saved after each."""

    def __init__(self, bench: Bench, args: argparse.Namespace, done: dict[str, Any]) -> None:
        self.bench, self.args, self.done = bench, args, done
        self.rows: dict[str, dict[str, Any]] = done[args.part]["rows"]
        self.extractor = get_extractor(args.extractor)
        # Only Fréchet's distance is asked for; every other measure takes seconds a row.
        self.reference = replace(load_reference(args.reference, self.extractor), features=None, spatial=None)
        self.made: dict[str, Made] = {}

    def measure(self, key: str, made: Made, **facts: Any) -> dict[str, Any]:
        """The row `key`, measured unless it is there."""
        model, plan = self.made[key] = made
        plan.check(model)
        if key in self.rows and self.rows[key]["plan"] == plan.digest():
            return self.rows[key]
        args, begun = self.args, clock()
        sampler = Sampler(model, plan)
        report = evaluate(
            lambda y, s: sampler(y, s).clamp(-1, 1), self.reference, self.extractor, args.num, batch=args.batch,
            num_classes=model.num_classes, repeats=args.sets,
        )  # fmt: skip
        row = {
            **facts, "plan": plan.digest(), "caching": _short(plan.provenance.get("caching", {})),
            "flops": self.bench.spent(plan, model, args.timed),
            "distance": report.distance.to_dict(), "accuracy": report.class_accuracy.mean,
        }  # fmt: skip
        self.rows[key] = row
        self.save()
        d = row["distance"]
        print(f"{key:58s} {d['mean']:.4f} ± {d['std'] or 0:.4f}  {clock() - begun:5.1f} s", flush=True)
        return row

    def base(self, guided: bool, steps: int | None = None) -> str:
        """Key of a measured plan of full steps."""
        steps = steps or self.bench.steps
        key = f"{steps} {'guided' if guided else 'full'} steps"
        self.measure(key, (self.bench.model, self.bench.full(steps, guided)), technique=None, strength=None, guided=guided)
        return key

    def add(self, case: Case) -> None:
        """The row of a case, its plain plan and its fewer steps."""
        base = self.base(case.guided)
        model, plan = case.make(self.bench)
        row = self.measure(
            f"{case.technique}: {case.strength}", (model, plan), technique=case.technique, strength=case.strength,
            guided=case.guided,
        )  # fmt: skip
        row["base"] = base
        row["share"] = row["flops"] / self.rows[base]["flops"]
        row["fewer"] = self.base(case.guided, fewer_steps(self.bench, row["flops"], case.guided))
        row["verdict"] = verdict(row["distance"]["values"], self.rows[row["fewer"]]["distance"]["values"])
        if row["share"] > 0.995:
            row["verdict"] = "same FLOPs: see seconds"
        self.save()

    @torch.no_grad()
    def retime(self) -> None:
        """Seconds and distance by pixel of everything made in this run, all rows in turn."""
        labels = [k % self.bench.model.num_classes for k in range(self.args.timed)]
        seeds = list(range(self.args.timed))
        samplers = {key: Sampler(*made) for key, made in self.made.items()}
        seconds: dict[str, list[float]] = {key: [] for key in samplers}
        images = {}
        for turn in range(self.args.rounds + 1):  # the first warms up
            for key, sampler in samplers.items():
                begun = clock()
                images[key] = sampler(labels, seeds)
                if turn:
                    seconds[key].append(clock() - begun)
        for key in samplers:
            row = self.rows[key]
            base = row.get("base") or f"{self.bench.steps} {'guided' if row['guided'] else 'full'} steps"
            pairs = zip(seconds[key], seconds[base], strict=True)
            row["seconds_share"] = statistics.median(a / b for a, b in pairs)
            row["seconds"] = statistics.median(seconds[key]) / self.args.timed
            row["off"] = float((images[key] - images[base]).square().mean().sqrt())
        self.save()

    def save(self) -> None:
        write_json(self.args.json, self.done)


def verdict(values: list[float], fewer: list[float]) -> str:
    """See the module's docstring."""
    pairs = list(zip(values, fewer, strict=True))
    if all(a < b * (1 - MARGIN) for a, b in pairs):
        return "better"
    return "worse" if all(a > b * (1 + MARGIN) for a, b in pairs) else "level"


def _short(caching: dict[str, Any]) -> dict[str, Any]:
    """A preset's options without what was measured (that is under "known")."""
    return {k: v for k, v in caching.items() if k not in ("polynomial", "ratios", "routers", "measured")}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| technique | strength | FLOPs | seconds | distance | off | full steps of no more FLOPs: distance, off | against them |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip

    def distance(row: dict[str, Any]) -> str:
        d = row["distance"]
        return f"{d['mean']:.3f} ± {d['std'] or 0:.3f}"

    def off(row: dict[str, Any]) -> str:
        return f"{row['off']:.3f}" if "off" in row else "?"

    for key in dict.fromkeys(row["base"] for row in rows.values() if "base" in row):
        lines.append(f"| **{key}** | | 100% | 100% | {distance(rows[key])} | 0 | | |")
    for row in rows.values():
        if "verdict" not in row:
            continue
        fewer = rows[row["fewer"]]
        seconds = f"{row['seconds_share']:.0%}" if "seconds_share" in row else "?"
        lines.append(
            f"| {row['technique']} | {row['strength']} | {row['share']:.0%} | {seconds} | {distance(row)} | {off(row)} "
            f"| {row['fewer'].split()[0]}: {distance(fewer)}, {off(fewer)} | {row['verdict']} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: dict[str, dict[str, Any]], file: Path, extractor: str) -> None:
    """Distance over FLOPs share and over seconds share, unguided rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 6.5), sharey=True)
    plain = [r for r in rows.values() if not r["guided"] and "seconds_share" in r]
    base = max(r["flops"] for r in plain if r["technique"] is None)
    names = list(dict.fromkeys(r["technique"] for r in plain if r["technique"]))
    colours, markers = plt.get_cmap("tab20").colors, "osv^D<>PX*hp"  # type: ignore[attr-defined]
    for axis, of in zip(axes, ("FLOPs", "seconds"), strict=True):
        where = (lambda r: r["flops"] / base) if of == "FLOPs" else (lambda r: r["seconds_share"])
        steps = sorted((r for r in plain if r["technique"] is None), key=lambda r: r["flops"])
        axis.plot([100 * where(r) for r in steps], [r["distance"]["mean"] for r in steps], "k-", lw=2.5, label="fewer full steps")
        for i, name in enumerate(names):
            own = [r for r in plain if r["technique"] == name]
            axis.plot(
                [100 * where(r) for r in own], [r["distance"]["mean"] for r in own], marker=markers[i % len(markers)],
                color=colours[i % 20], lw=0.8, ms=6, label=name,
            )  # fmt: skip
        axis.set_xlabel(f"{of}, % of the plain plan")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel(f"Fréchet distance ({extractor})")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def cifar_size() -> Denoiser:
    """A DiT for 32x32 at patch 2 with random weights, a weak patch of 4 and no zero gates."""
    torch.manual_seed(0)
    config = DiTConfig(
        input_size=(32, 32), patch_size=(2, 2), in_channels=3, width=384, depth=12, heads=6, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip
    network = DiT(config).eval().requires_grad_(False)
    nn.init.normal_(network.modulation.weight, std=0.02)
    nn.init.normal_(network.modulation.bias, std=0.3)
    nn.init.normal_(network.head.weight, std=0.05)
    model = flexify(Denoiser(network, get_path("linear"), "velocity", NetworkTime(scale=1000.0)), [4])
    model.network.requires_grad_(False)
    return model


@torch.no_grad()
def time_cifar_size(args: argparse.Namespace, done: dict[str, Any]) -> None:
    """Seconds share and FLOPs share of every technique's middle strength; each next to its plain plan."""
    known = done["known"].setdefault("cifar_size", {})
    bench = Bench(cifar_size(), args.cifar_steps, args.solver, args.guidance, 2, known, learned=False)
    rows = done["cifar_size"]["rows"]
    labels, seeds = [k % 10 for k in range(4)], list(range(4))
    cases: dict[str, list[Case]] = {}
    for case in catalogue(bench):
        cases.setdefault(case.technique, []).append(case)
    for technique, found in cases.items():
        if technique in rows or (args.techniques and technique not in args.techniques):
            continue
        case = found[len(found) // 2]
        model, plan = case.make(bench)
        plain = bench.full(guided=case.guided)
        ours, theirs = Sampler(model, plan), Sampler(bench.model, plain)
        share = bench.spent(plan, model, len(seeds)) / bench.spent(plain)
        ratios = []
        for turn in range(args.cifar_rounds + 1):
            spent = []
            for sampler in (theirs, ours) if turn else (ours,):  # the first warms up
                begun = clock()
                sampler(labels, seeds)
                spent.append(clock() - begun)
            if turn:
                ratios.append(spent[1] / spent[0])
        rows[technique] = {
            "strength": case.strength, "share": share, "seconds_share": statistics.median(ratios),
            "lowest": min(ratios), "highest": max(ratios), "plain_seconds": spent[0],
        }  # fmt: skip
        write_json(args.json, done)
        print(cifar_line(technique, rows[technique]), flush=True)


def cifar_line(technique: str, row: dict[str, Any]) -> str:
    gap = row["seconds_share"] - row["share"]
    within = "yes" if abs(gap) <= 0.1 else "no"
    return (
        f"| {technique} | {row['strength']} | {row['share']:.1%} | {row['seconds_share']:.1%} "
        f"[{row['lowest']:.0%}, {row['highest']:.0%}] | {100 * gap:+.1f} | {within} |"
    )


def cifar_table(rows: dict[str, dict[str, Any]]) -> str:
    head = "| technique | strength | FLOPs | seconds [least, most] | difference, points | within 10 |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(cifar_line(name, row) for name, row in rows.items()) + "\n"


def into_page(page: Path, name: str, text: str) -> None:
    """Put a table between its two marks in the page, if the page has them."""
    if not page.exists():
        return
    before, mark, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    if mark and end:
        page.write_text(before + mark + text + end + after, encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--part", default="digits", help="where rows are kept, and the table's mark in the page")
    parser.add_argument("--extractor", default="digits-classifier")
    parser.add_argument("--reference", default="digits")
    parser.add_argument("--strengths", type=int, default=3, help="of a technique, from the middle one on")
    parser.add_argument("--techniques", nargs="*", help="only these (as the table names them)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--solver", default="dpmpp-2m")
    parser.add_argument("--guidance", type=float, default=1.5, help="scale of the guided rows")
    parser.add_argument("--num", type=int, default=150, help="samples per set of seeds")
    parser.add_argument("--sets", type=int, default=2)
    parser.add_argument("--batch", type=int, default=150)
    parser.add_argument("--timed", type=int, default=25, help="samples of a timed batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--exits", help="a digits model with trained exits (docs/exits.md)")
    parser.add_argument("--widths", nargs="*", default=[], help="digits models with routed width (docs/dydit.md)")
    parser.add_argument("--json", type=Path, default=Path("docs/techniques.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/techniques.md"))
    parser.add_argument("--plot", type=Path, default=Path("docs/images/techniques.png"))
    parser.add_argument("--untimed", action="store_true", help="no seconds yet: on a machine that is not quiet")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the output file")
    parser.add_argument("--quick", action="store_true", help="2 x 50 samples, one round: does everything run?")
    parser.add_argument("--cifar-size", action="store_true", help="seconds against FLOPs instead of the table")
    parser.add_argument("--cifar-steps", type=int, default=10)
    parser.add_argument("--cifar-rounds", type=int, default=3)
    args = parser.parse_args()
    if args.quick:
        args.num, args.rounds, args.batch, args.timed, args.cifar_rounds, args.cifar_steps = 50, 1, 50, 10, 1, 10
    return args


def main() -> None:
    args = parse()
    part = "cifar_size" if args.cifar_size else args.part
    names = ("cifar_steps", "solver", "guidance") if args.cifar_size else ("model", "steps", "solver", "guidance", "num", "sets")
    settings = {name: getattr(args, name) for name in names}
    done: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {"known": {}}
    if not args.resume or done.get(part, {}).get("settings") != settings:
        done[part] = {"settings": settings, "rows": {}}
    done[part]["machine"] = machine()
    if args.cifar_size:
        time_cifar_size(args, done)
        into_page(args.page, "cifar-size", cifar_table(done[part]["rows"]))
        return
    model = pliant.load(args.model)
    model.network.requires_grad_(False)
    widths = {Path(p).parent.name if Path(p).name == "model" else Path(p).name: pliant.load(p) for p in args.widths}
    bench = Bench(
        model, args.steps, args.solver, args.guidance, 8, done["known"].setdefault(part, {}),
        exits=pliant.load(args.exits) if args.exits else None, widths=widths,
    )  # fmt: skip
    measured = Table(bench, args, done)
    cases: dict[str, list[Case]] = {}
    for case in catalogue(bench):
        if not args.techniques or case.technique in args.techniques:
            cases.setdefault(case.technique, []).append(case)
    for found in cases.values():
        middle = len(found) // 2
        for case in found if args.strengths >= len(found) else found[middle : middle + args.strengths]:
            measured.add(case)
    if not args.untimed:
        measured.retime()
    text = table(measured.rows)
    print(text)
    into_page(args.page, args.part, text)
    if not args.untimed:
        plot(measured.rows, args.plot, args.extractor)


if __name__ == "__main__":
    main()
