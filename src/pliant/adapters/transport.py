"""Sampling between two sets of data: the flow of a trained stochastic interpolant."""

from __future__ import annotations

from dataclasses import replace

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.paths import get_path


def transport(denoiser: Denoiser) -> Denoiser:
    """The velocities of an interpolant between two sets of data as a flow that plans can run; weights are shared.

    The velocity of an interpolant is that of a flow from one set to the other (arXiv 2303.08797, theorem 2.6): from an
    image of the source at t = 1, `pliant.sample(transport(model), plan, labels, x=images)` follows it. Every
    deterministic solver integrates it, since on the linear path all of them integrate `dx/dt = v`, whatever the ends
    are. "Clean data", "noise" and scores that the new denoiser speaks of mean nothing here, so neither do solvers that
    draw noise. Raises ConfigError for a network that predicts something else, or whose source is noise already.
    """
    if denoiser.path.gaussian_source:
        raise ConfigError(f"a model on path {denoiser.path.name!r} starts from noise: sample it as it is")
    if denoiser.prediction != "velocity" or denoiser.trained is not None:
        raise ConfigError(
            f"the flow between two sets of data follows a velocity head; this network predicts {denoiser.prediction!r}"
        )
    return replace(denoiser, path=get_path("linear"), own_plan=None)
