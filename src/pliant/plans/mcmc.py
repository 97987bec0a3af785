"""Denoising MCMC (Kim & Ye, ICML 2023, arXiv 2209.14593; sheet D, 12): a stream of samples, not a plan.

A Markov chain walks in (image, noise level) space, on states `y = x0 + sigma*eps`, with p(y, sigma_k) = p_k(y)/K. It
visits low noise levels by itself, and only from there each output is denoised, which takes few network calls:

1. y <- y + eta/2 * score(y, sigma) + sqrt(eta) * z            one call (Langevin)
2. sigma ~ p(sigma | y)                                        a small classifier of the noise level (Gibbs)
3. after `skip` such updates one state (the least noisy visited) is denoised; the chain goes on from where it was.

Networks on any Gaussian path serve: y is x/alpha, sigma is sigma/alpha. Samples of one chain are correlated: run many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.errors import PlanError, suggest
from pliant.paths import Path
from pliant.paths.levels import karras_level
from pliant.plans.noise import batch_noise, check_seeds
from pliant.plans.sampling import check_labels
from pliant.solvers import Eval, Output, Program, SolverLike, compile_program, get_solver, run

RULES = ("sample", "argmax")
OUTPUTS = ("least-noisy", "last")


def geometric_levels(count: int = 1000, smallest: float = 0.01, largest: float = 50.0) -> Tensor:
    """(count,) noise levels, growing by a constant factor. The paper's for CIFAR-10 are the defaults."""
    if count < 2 or not 0.0 < smallest < largest:
        raise PlanError(f"noise levels need count >= 2 and 0 < smallest < largest, got {count}, {smallest}, {largest}")
    return torch.exp(torch.linspace(math.log(smallest), math.log(largest), count, dtype=torch.float64))


@dataclass(frozen=True)
class Chains:
    """Where the chains are: states y (B, ...), level indices (B,), and how many updates they made."""

    y: Tensor
    level: Tensor
    updates: int = 0


@dataclass(frozen=True)
class Round:
    """One output of every chain: finished samples (B, ...), the noise level each was denoised from, and the chains.

    evaluations: network calls per sample, on average.
    """

    samples: Tensor
    sigma: Tensor
    chains: Chains
    evaluations: float


Denoise = Callable[[Tensor, Tensor], Tensor]
"""(y (B, ...), sigma (B,)) -> the estimate of clean data."""
Levels = Callable[[Tensor], Tensor]
"""y (B, ...) -> (B, K) log-probabilities of the levels, up to a constant per row."""
Finish = Callable[[Tensor, float, Tensor], tuple[Tensor, int]]
"""(y (b, ...), sigma, rows (b,) of the batch) -> (samples, network calls)."""
Draw = Callable[[int, tuple[int, ...]], Tensor]
"""(slot, shape) -> standard normal (B, *shape); the same slot always gives the same numbers."""


@dataclass(frozen=True)
class DenoisingMCMC:
    """The sampler. `for_model` builds one for a denoiser.

    sigmas: (K,) levels, growing. step_size: Langevin's eta, absolute as published, or times sigma^2 if `relative`
    (then every level mixes equally well; keep it below 0.1). skip: updates between outputs.

    rule: "sample" draws the level (a valid Gibbs step); "argmax" takes the likeliest, as the published code does.
    output: which state of a round is denoised, the "least-noisy" one as published or the "last" one. The published
    choices are biased (`biased`), whatever the network: argmax loses detailed balance, and picking the state of a round
    by its noise level prefers regions where the level falls easily. On a three-component mixture the latter moves 6 %
    of the mass between components, beyond the 3 % that sheet D, 12 (2) allows; "last" stays at about 1 %. Its price:
    outputs start at 0.24 of the largest level on average instead of 0.07, and take 18.5 calls instead of 15.6.
    """

    denoise: Denoise
    level_model: Levels
    finish: Finish
    sigmas: Tensor
    step_size: float = 0.8
    relative: bool = False
    skip: int = 10
    rule: str = "sample"
    output: str = "least-noisy"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise PlanError(f"unknown level rule {self.rule!r}: {suggest(self.rule, RULES)}")
        if self.output not in OUTPUTS:
            raise PlanError(f"unknown output {self.output!r}: {suggest(self.output, OUTPUTS)}")
        if self.skip < 1 or not self.step_size > 0.0:
            raise PlanError(f"skip and step_size must be positive, got {self.skip} and {self.step_size}")
        if self.sigmas.ndim != 1 or not bool((self.sigmas[1:] > self.sigmas[:-1]).all()):
            raise PlanError("noise levels are a growing list")

    @property
    def biased(self) -> bool:
        """Whether outputs are not distributed as the data even for an exact network and small steps."""
        return self.rule == "argmax" or self.output == "least-noisy"

    def start(self, x0: Tensor, draw: Draw, sigma: float = 0.5) -> Chains:
        """Chains at clean samples (B, ...) with noise of about `sigma` added: the paper's start is one generation."""
        level = int((self.sigmas - sigma).abs().argmin())
        y = x0 + float(self.sigmas[level]) * draw(-1, tuple(x0.shape[1:]))
        return Chains(y, torch.full((len(x0),), level))

    @torch.no_grad()
    def update(self, chains: Chains, draw: Draw) -> Chains:
        """One Langevin move of y and one move of the level."""
        y, n = chains.y, chains.updates
        sigma = self.sigmas[chains.level]
        wide = sigma.to(y).reshape(-1, *[1] * (y.ndim - 1))
        eta = self.step_size * wide**2 if self.relative else torch.full_like(wide, self.step_size)
        score = (self.denoise(y, sigma) - y) / wide**2
        y = y + 0.5 * eta * score + eta.sqrt() * draw(2 * n, tuple(y.shape[1:])).to(y)
        return Chains(y, self._level(y, draw(2 * n + 1, (1,))), n + 1)

    def _level(self, y: Tensor, z: Tensor) -> Tensor:
        log_p = self.level_model(y).double()
        if log_p.shape != (len(y), len(self.sigmas)):
            raise PlanError(f"the level model must answer {(len(y), len(self.sigmas))}, got {tuple(log_p.shape)}")
        if self.rule == "argmax":
            return log_p.argmax(1).cpu()
        u = torch.special.ndtr(z.double().reshape(-1, 1).cpu())  # a uniform number per chain
        above = torch.softmax(log_p, 1).cumsum(1).cpu()
        return torch.searchsorted(above / above[:, -1:], u).clamp(max=len(self.sigmas) - 1)[:, 0]

    @torch.no_grad()
    def rounds(self, chains: Chains, draw: Draw) -> Iterator[Round]:
        """An endless stream: one finished sample per chain and round. The chains continue un-denoised."""
        while True:
            best: Chains | None = None
            for _ in range(self.skip):
                chains = self.update(chains, draw)
                newest = best is None or self.output == "last"
                best = chains if newest else _less_noisy(best, chains)  # type: ignore[arg-type]
            assert best is not None
            samples, calls = torch.empty_like(best.y), 0
            for level in best.level.unique().tolist():  # chains at one level share a run
                rows = torch.nonzero(best.level == level).flatten()
                samples[rows], count = self.finish(best.y[rows], float(self.sigmas[level]), rows)
                calls += count * len(rows)
            yield Round(samples, self.sigmas[best.level], chains, self.skip + calls / len(samples))

    @staticmethod
    def for_model(
        model: Denoiser,
        cond: Sequence[int] | Tensor,
        level_model: Levels,
        sigmas: Tensor,
        solver: SolverLike = "dpmpp-2m",
        steps: int = 10,
        step_size: float = 0.8,
        relative: bool = False,
        skip: int = 10,
        rule: str = "sample",
        output: str = "least-noisy",
    ) -> DenoisingMCMC:
        """Chains for a denoiser: one per label of `cond`, finished by `solver` on `steps` Karras steps and one to 0."""
        labels = check_labels(cond, model)

        def denoise(y: Tensor, sigma: Tensor) -> Tensor:
            t = model.path.time_of_noise_ratio(sigma).to(y.device)
            alpha = model.path.alpha_sigma(t).alpha.to(y).reshape(-1, *[1] * (y.ndim - 1))
            return model(alpha * y, t, labels).to("sample").to(y.dtype)

        programs = finishing_programs(model, sigmas, solver, steps)

        def finish(y: Tensor, sigma: float, rows: Tensor) -> tuple[Tensor, int]:
            program = programs(sigma)

            def evaluate(x: Tensor, op: Eval) -> Output:
                return Output(model(x, op.node.t, labels[rows.to(labels.device)]).value)

            return run_finish(program, y, evaluate), program.num_evaluations

        return DenoisingMCMC(denoise, level_model, finish, sigmas, step_size, relative, skip, rule, output)


def _less_noisy(a: Chains, b: Chains) -> Chains:
    """Per chain the state at the lower level; the newer one if equal."""
    take = b.level <= a.level
    mask = take.to(a.y.device).reshape(-1, *[1] * (a.y.ndim - 1))
    return replace(b, y=torch.where(mask, b.y, a.y), level=torch.where(take, b.level, a.level))


def finishing_times(path: Path, sigma: float, last: float, steps: int) -> Tensor:
    """Karras's grid (arXiv 2206.00364, eq. 5, rho = 7) restarted at `sigma`: `steps` steps to `last`, one to 0."""
    end = torch.zeros(1, dtype=torch.float64)
    if sigma <= last * (1.0 + 1e-6):
        return torch.cat([path.time_of_noise_ratio(torch.tensor([sigma], dtype=torch.float64)), end])
    ratios = karras_level(torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64), last, sigma)
    return torch.cat([path.time_of_noise_ratio(ratios), end])


def finishing_programs(model: Denoiser, sigmas: Tensor, solver: SolverLike, steps: int) -> Callable[[float], Program]:
    """The program that denoises from a level, compiled when first needed."""
    last = float(sigmas[0])
    if get_solver(solver).stochastic:
        raise PlanError("chains are finished by a deterministic solver: the noise is in the chain")

    @cache
    def program(sigma: float) -> Program:
        return compile_program(model.path, finishing_times(model.path, sigma, last, steps), solver, model.prediction)

    return program


def run_finish(program: Program, y: Tensor, evaluate: Callable[[Tensor, Eval], Output]) -> Tensor:
    """Denoise y = x/alpha to the end of a program."""
    x = y * program.start.alpha
    for result in run(program, x, evaluate):
        x = result.x
    return x / program.end.alpha


def seeded_draw(seeds: Sequence[int], device: torch.device | str = "cpu") -> Draw:
    """One generator per chain: chain k is the same alone and in a batch."""
    checked = check_seeds(seeds, len(seeds))
    return lambda slot, shape: batch_noise(checked, slot, shape, torch.device(device))
