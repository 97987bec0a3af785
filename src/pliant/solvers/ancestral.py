"""Samplers that choose their own noise: DDPM with the official DiT variances (sheet A, 3.3), and full re-noising."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pliant.errors import PlanError, suggest
from pliant.solvers.builder import ProgramBuilder
from pliant.solvers.coefficients import depth_of_eta, get_form, step_weights
from pliant.solvers.program import LearnedNoise, Node
from pliant.solvers.solver import Solver

VARIANCES = ("learned-range", "posterior", "beta")


def respaced_beta(s: Node, t: Node) -> float:
    """`1 - alpha_s^2/alpha_t^2`: beta of a respaced chain between t and the noisier s."""
    ratio = s.alpha / t.alpha
    return (1.0 - ratio) * (1.0 + ratio)


@dataclass(frozen=True)
class DDPM(Solver):
    """Ancestral sampling (arXiv 2006.11239): posterior mean of x_t given x_s and the x0 estimate, plus noise.

    variance: "learned-range" (default; the network interpolates between the two others in the log domain,
    DiT's released models), "posterior" (beta-tilde, small) or "beta" (large). Arriving at sigma = 0 no noise
    is added, so the zero posterior variance of the last step, which the official code patches, is never
    needed. No clipping.
    """

    form = "sample"
    convergence = 1

    variance: str = "learned-range"

    def __post_init__(self) -> None:
        if self.variance not in VARIANCES:
            raise PlanError(f"unknown ddpm variance {self.variance!r}: {suggest(self.variance, VARIANCES)}")

    @property
    def stochastic(self) -> bool:
        return True

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        s, t = builder.nodes[i], builder.nodes[i + 1]
        if self.variance == "learned-range" and not builder.variance:
            raise PlanError(
                "ddpm with variance 'learned-range' needs a network that predicts variances, unlike this "
                "one; use {'name': 'ddpm', 'variance': 'posterior'}"
            )
        output = builder.evaluate(s)  # always its own call: the variance belongs to this state
        builder.remember(output)
        # The posterior mean is the tau = 1 step in x0 form; only the size of the noise is DDPM's own choice.
        form = get_form("sample")
        step, (weight,) = step_weights(form, s, t, [s], depth=depth_of_eta(1.0, s, t))
        rows = [(weight, builder.convert(output, form.kind))]
        x = {builder.state: step.a}
        mu = t.beta - step.a * s.beta
        if t.sigma == 0.0:
            builder.advance(builder.combine_rows(t, x, rows, mu=mu))
            return
        slot, beta = builder.noise(), respaced_beta(s, t)
        if self.variance == "learned-range":
            low, high = 2.0 * math.log(step.noise), math.log(beta)
            learned = LearnedNoise(slot, output.out, low, high)
            builder.advance(builder.combine_rows(t, x, rows, mu=mu, learned=learned))
        else:
            size = step.noise if self.variance == "posterior" else math.sqrt(beta)
            builder.advance(builder.combine_rows(t, x, rows, z={slot: size}, mu=mu))


@dataclass(frozen=True)
class FullNoise(Solver):
    """`x_t = alpha_t * x0 + sigma_t * z` with fresh noise at every step: consistency sampling, diffusers'
    `stochastic_sampling` (sheet D, 13.4).

    The limit tau = infinity. It discretises nothing: however small the steps, samples have too little variance unless
    the x0 estimate is itself a sample of the data (a distilled model), so its order is 0.
    """

    form = "sample"
    convergence = 0

    @property
    def stochastic(self) -> bool:
        return True

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        s, t = builder.nodes[i], builder.nodes[i + 1]
        outputs, base = [builder.output(i)], (builder.state, s)
        if t.sigma > 0.0:
            builder.advance(builder.transfer("sample", t, outputs, base=base, depth=math.inf))
        else:  # no noise is left to be fresh
            builder.advance(builder.transfer("sample", t, outputs, base=base))
