"""What `techniques.py` measures: every technique that makes a call cheaper, at three strengths, as plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from pliant import Compute, Denoiser
from pliant.compute import LowBand
from pliant.compute.sites import format_sites
from pliant.guidance import Guidance
from pliant.plans import Plan
from pliant.plans.caching.taken import spent_flops
from pliant.plans.guiding import computed_every, computed_once, guided_between

Made = tuple[Denoiser, Plan]


@dataclass
class Bench:
    """What plans are made for, and what was measured on the model to make them (kept between runs)."""

    model: Denoiser
    steps: int
    solver: str
    scale: float = 1.5
    """Of guided plans."""
    samples: int = 8
    """For calibration, and for finding a threshold."""
    known: dict[str, Any] = field(default_factory=dict)
    learned: bool = True
    """Learn Learning-to-Cache's routers; else every second site is reused (timing only)."""
    exits: Denoiser | None = None
    widths: dict[str, Denoiser] = field(default_factory=dict)
    """Label -> a model with routed width."""

    def full(self, steps: int | None = None, guided: bool = False) -> Plan:
        guidance = self.scale if guided else None
        return Plan.uniform(self.model, steps or self.steps, self.solver, guidance=guidance)

    def change(self, first: int, last: int, compute: Compute, model: Denoiser | None = None) -> Made:
        """The full plan with another compute in steps first..last-1."""
        plan = Plan.uniform(model or self.model, self.steps, self.solver)
        rows = (replace(s, compute=compute) if first <= i < last else s for i, s in enumerate(plan.steps))
        return model or self.model, plan.with_steps(rows)

    def spent(self, plan: Plan, model: Denoiser | None = None, count: int | None = None) -> float:
        """FLOPs per image: exact, and on so many samples where gates or routers decide while sampling."""
        model = model or self.model
        seeds = list(range(count or self.samples))
        labels = [k % model.num_classes for k in seeds]
        return spent_flops(plan, model, labels, seeds)

    def cached(self, name: str, calibrate: bool = False, **options: Any) -> Made:
        """A caching preset, its calibration made once."""
        plan = self.full()
        if calibrate:
            own = {k: options.pop(k) for k in ("penalty", "iterations", "lr") if k in options}
            key = " ".join([name, f"{self.steps} steps", *(f"{k}={v}" for k, v in own.items())])
            if key not in self.known:
                blank = {"threshold": 0.0} if name in ("teacache", "magcache") else {}
                made = plan.cached(self.model, name, calibrate=self.samples, **own, **blank)
                found = made.provenance["caching"]
                self.known[key] = {k: found[k] for k in ("polynomial", "ratios", "routers") if k in found}
            options = {**self.known[key], **options}
        return self.model, plan.cached(self.model, name, **options)

    def tuned(self, name: str, share: float, most: float, calibrate: bool = False, **options: Any) -> Made:
        """A preset whose threshold (at most `most`) is set so that `share` of the FLOPs is spent on the samples."""
        key = f"{name} {self.steps} steps, {share:.0%}: threshold"
        if key not in self.known:
            full = self.spent(self.full())
            low, high = most * 1e-3, most
            for _ in range(7):
                middle = (low * high) ** 0.5
                _, plan = self.cached(name, calibrate, threshold=middle, **options)
                low, high = (middle, high) if self.spent(plan) > share * full else (low, middle)
            self.known[key] = float(f"{high:.3g}")
        return self.cached(name, calibrate, threshold=self.known[key], **options)

    def skipped(self, blocks: tuple[int, ...], first: int, last: int) -> Made:
        depth = self.model.network_for(Compute()).config.depth
        letters = "".join("KK" if b in blocks else "RR" for b in range(depth))
        return self.change(first, last, Compute(sites=format_sites(letters)))

    def routers(self, penalty: float) -> Made:
        if self.learned:
            return self.cached("l2c", calibrate=True, penalty=penalty, iterations=30, lr=0.3)
        depth = self.model.network_for(Compute()).config.depth
        sites = format_sites("RRCC" * (depth // 2) + "RR" * (depth % 2))
        return self.cached("l2c", routers={str(i): sites for i in range(1, self.steps, 2)})


@dataclass(frozen=True)
class Case:
    """One row: a technique at one strength."""

    technique: str
    strength: str
    make: Callable[[Bench], Made]
    guided: bool = False
    """Compared with the guided plans."""


def _rows(technique: str, *found: tuple[str, Callable[[Bench], Made]], guided: bool = False) -> Iterator[Case]:
    for strength, make in found:
        yield Case(technique, strength, make, guided)


def _preset(technique: str, name: str, *strengths: dict[str, Any], **common: Any) -> Iterator[Case]:
    for options in strengths:
        label = ", ".join(f"{k} {v:g}" for k, v in options.items())
        yield Case(technique, label, lambda b, o=options: b.cached(name, **o, **common))  # type: ignore[misc]


def _gate(technique: str, name: str, most: float, *shares: float, **common: Any) -> Iterator[Case]:
    for share in shares:
        make = lambda b, s=share: b.tuned(name, s, most, **common)  # noqa: E731
        yield Case(technique, f"threshold for {share:.0%}", make)


def _part(b: Bench, share: float) -> int:
    return round(share * b.steps)


def _weak_reference(b: Bench, share: float) -> Made:
    plan = Plan.weak_to_powerful(
        b.model, b.steps, weak_steps=0, weak_guidance_steps=_part(b, share), solver=b.solver, guidance=b.scale
    )
    return b.model, plan


def catalogue(bench: Bench) -> Iterator[Case]:
    """All cases that this model can run."""
    intervals = ({"interval": 2}, {"interval": 3}, {"interval": 5})
    yield from _preset("FORA", "fora", *intervals)
    yield from _preset("DeepCache-like", "deepcache", *intervals)
    yield from _preset("Delta-DiT", "delta-dit", *intervals)
    yield from _preset("PAB", "pab", {"attention": 2}, {"attention": 2, "mlp": 2}, {"attention": 4, "mlp": 4})
    yield from _preset("FasterCache (attention)", "fastercache", *intervals)
    yield from _preset("TaylorSeer", "taylorseer", {"interval": 3}, {"interval": 5}, {"interval": 8}, order=2)
    yield from _preset("Spectrum", "spectrum", {"growth": 0.25}, {"growth": 0.75}, {"growth": 3.0})
    yield from _gate("TeaCache", "teacache", 30.0, 0.7, 0.5, 0.3, calibrate=True)
    yield from _gate("First-block cache", "fbc", 0.99, 0.7, 0.5, 0.35)
    yield from _gate("DBCache", "dbcache", 0.99, 0.7, 0.5, 0.4, front=1, warmup=max(1, bench.steps // 6))
    yield from _gate("EasyCache", "easycache", 10.0, 0.7, 0.5, 0.35, warmup=bench.steps // 5)
    yield from _gate("MagCache", "magcache", 30.0, 0.7, 0.5, 0.35, calibrate=True, max_run=8)
    for penalty in (3e-4, 3e-3, 3e-2):
        yield Case("Learning-to-Cache", f"penalty {penalty:g}", lambda b, p=penalty: b.routers(p))  # type: ignore[misc]
    rank = bench.model.config.width // 12  # published: a ninth; products like multiples of 8
    yield from _preset("Increment correction", "icc", *({"interval": n, "rank": rank} for n in (2, 3, 5)))
    yield from _rows(
        "Layer skipping",
        ("block 3, first half", lambda b: b.skipped((2,), 0, _part(b, 0.5))),
        ("block 3, all steps", lambda b: b.skipped((2,), 0, b.steps)),
        ("blocks 3 and 4, first half", lambda b: b.skipped((2, 3), 0, _part(b, 0.5))),
    )
    exits = bench.exits
    if exits is not None:
        yield from _rows(
            "Early exits",
            ("exit 3, first half", lambda b: b.change(0, _part(b, 0.5), Compute(exit=3), exits)),
            ("exit 2, first half", lambda b: b.change(0, _part(b, 0.5), Compute(exit=2), exits)),
            ("exit 1, first half", lambda b: b.change(0, _part(b, 0.5), Compute(exit=1), exits)),
        )
    for label, routed in bench.widths.items():
        make = lambda b, m=routed: (m, Plan.uniform(m, b.steps, b.solver))  # noqa: E731
        yield Case("DyDiT", label, make)
    yield from _preset("RAS", "ras", {"ratio": 0.75}, {"ratio": 0.5}, {"ratio": 0.25})
    yield from _preset("Token merging", "tome", {"ratio": 0.25}, {"ratio": 0.5}, {"ratio": 0.75})
    if len(bench.model.patch_sizes) > 1:
        for share in (0.2, 0.4, 0.6):
            make = lambda b, s=share: (  # noqa: E731
                b.model, Plan.weak_to_powerful(b.model, b.steps, weak_steps=_part(b, s), solver=b.solver)
            )  # fmt: skip
            yield Case("Weak patches first", f"{share:.0%} of the steps", make)
    low = Compute(scale=LowBand.of(2, band="dct", positions="center"))
    for share in (0.1, 0.2, 0.4):
        make = lambda b, s=share: b.change(0, _part(b, s), low)  # noqa: E731
        yield Case("Low band first (no training)", f"{share:.0%} of the steps", make)
    yield from _rows(
        "Precision",
        ("fp32", lambda b: b.change(0, b.steps, Compute(precision="fp32"))),
        ("bf16-mixed", lambda b: b.change(0, b.steps, Compute(precision="bf16-mixed"))),
        ("int8d", lambda b: b.change(0, b.steps, Compute(precision="int8d"))),
    )
    rule = Guidance.cfg(bench.scale)
    yield from _rows(
        "Guidance in an interval",
        ("sigma/alpha 0.11 to 4", lambda b: (b.model, guided_between(b.full(), rule, 0.11, 4.0))),
        ("sigma/alpha 0.28 to 1.61", lambda b: (b.model, guided_between(b.full(), rule, 0.283, 1.609))),
        ("sigma/alpha 0.67 to 1.5", lambda b: (b.model, guided_between(b.full(), rule, 0.667, 1.5))),
        guided=True,
    )
    yield from _rows(
        "Guidance difference reused",
        ("every 2nd computed", lambda b: (b.model, computed_every(b.full(), rule, 2))),
        ("every 5th computed", lambda b: (b.model, computed_every(b.full(), rule, 5))),
        ("every 10th computed", lambda b: (b.model, computed_every(b.full(), rule, 10))),
        guided=True,
    )
    yield from _rows(
        "Reference computed once",
        ("moderation 1", lambda b: (b.model, computed_once(b.full(), rule))),
        ("moderation 0.5", lambda b: (b.model, computed_once(b.full(), rule, 0.5))),
        ("moderation 0.25", lambda b: (b.model, computed_once(b.full(), rule, 0.25))),
        guided=True,
    )
    if len(bench.model.patch_sizes) > 1:
        for share in (0.3, 0.6, 1.0):
            make = lambda b, s=share: _weak_reference(b, s)  # noqa: E731
            yield Case("Guidance by the weak patch", f"{share:.0%} of the steps", make, guided=True)
