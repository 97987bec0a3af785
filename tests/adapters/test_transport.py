"""Sampling between two sets of data: the flow of an interpolant's velocities."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pliant.adapters.transport import transport
from pliant.errors import ConfigError
from pliant.paths import get_path
from pliant.plans import uniform
from pliant.solvers import Output, run
from support.networks import tiny_denoiser
from support.training import formula_denoiser

PATH = get_path("interpolant", kind="linear", gamma="brownian", strength=2.0)


def exact_velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Of x0 ~ N(0.5, 0.6^2), x1 ~ N(-1, 1.3^2) (sheet C, 11): the flow takes one Gaussian to the other, linearly."""
    s, t = PATH.coefficients(t.double()), t.double()
    slope = s.a * s.da * 0.36 + s.b * s.db * 1.69 + PATH.gamma_product(t)
    width = s.a**2 * 0.36 + s.b**2 * 1.69 + s.c**2
    a, b, da, db, slope, width = (v.reshape(-1, 1, 1, 1) for v in (s.a, s.b, s.da, s.db, slope, width))
    return (0.5 * da - db + slope / width * (x - (0.5 * a - b))).to(x)


@pytest.mark.parametrize(("solver", "steps", "tolerance"), [("heun", 64, 1e-3), ("dpmpp-2m", 200, 1e-2)])
def test_images_of_the_source_flow_to_the_data(solver: str, steps: int, tolerance: float) -> None:
    model = replace(formula_denoiser(exact_velocity), path=PATH)
    start = -1.0 + 1.3 * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    flow, labels = transport(model), torch.zeros(4, dtype=torch.int64)
    program = uniform(flow, steps, solver).program(flow)
    *_, last = run(program, start, lambda x, call: Output(flow(x, call.node.t, labels).value), None)
    found = last.x
    torch.testing.assert_close(found, 0.5 + 0.6 * (start + 1.0) / 1.3, atol=tolerance, rtol=0)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="starts from noise"):
        transport(tiny_denoiser())
    with pytest.raises(ConfigError, match="velocity head"):
        transport(replace(tiny_denoiser(prediction="score"), path=PATH))
    with pytest.raises(ConfigError, match=r"images of the source through pliant\.adapters\.transport"):
        uniform(replace(tiny_denoiser(), path=PATH), 4, "euler")
