"""Consistency levels of a stream against diffusers' LCMScheduler on the same outputs and noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.paths import NetworkTime, VPDiscrete
from pliant.solvers import Output, run
from pliant.tasks.streaming import Stream, consistency_plan
from support.networks import tiny_denoiser


def test_consistency_levels_are_diffusers_lcm(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import LCMScheduler
    from diffusers.schedulers import scheduling_lcm

    scheduler = LCMScheduler(clip_sample=False)
    scheduler.set_timesteps(4, original_inference_steps=50)
    path = VPDiscrete("scaled-linear")
    model = replace(tiny_denoiser(path="vp-discrete", prediction="epsilon"), path=path)
    model = replace(model, network_time=NetworkTime.timesteps(1000))
    levels = [float(path.time_of_timestep(int(k))) for k in scheduler.timesteps]
    # At 3/1000 the skip part is 2e-4 of the sum; a small timestep_scale makes it count.
    for scale in (10.0, 0.001):
        scheduler.register_to_config(timestep_scaling=scale)
        plan = consistency_plan(model, levels, timestep_scale=scale)
        generator = torch.Generator().manual_seed(0)
        noises = torch.randn(4, 1, 2, 8, 8, generator=generator)
        start = torch.randn(1, 2, 8, 8, generator=generator)

        def network(x: Tensor) -> Tensor:
            return torch.sin(3 * x)

        drawn = iter(noises)
        monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *a, drawn=drawn, **k: next(drawn))
        scheduler.set_timesteps(4, original_inference_steps=50)
        x, wanted = start, []
        for k in scheduler.timesteps:
            x = scheduler.step(network(x), k, x).prev_sample
            wanted.append(x)

        def evaluate(state: Tensor, evaluation: Any) -> Output:
            return Output(network(state))

        found = [r.x for r in run(plan.program(model), start, evaluate, lambda slot, noises=noises: noises[slot])]
        # diffusers keeps its table in float32; the first level has alpha = 0.07, which magnifies that.
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        assert Stream(model, plan, 0).latency == 3
