"""Static rules against diffusers' own hooks, asked step by step. (Gated rules: test_caching_gates.py.)"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from pliant.plans.caching import Row, Target
from pliant.plans.caching.forecasts import taylorseer_diffusers
from pliant.plans.caching.intervals import pab
from pliant.plans.caching.magcache import magcache

pytest.importorskip("diffusers")

FLUX = [1, 1.211, 1.117, 1.078, 1.0625, 1.039, 1.031, 1.039, 1.023, 1.031, 1.023, 0.980, 1.016, 1.008, 1, 1.008, 1]
FLUX += [1.008, 1, 1, 0.996, 0.996, 0.980, 0.988, 0.965, 0.957, 0.934, 0.891]


def target(steps: int) -> Target:
    return Target(tuple(1 - i / steps for i in range(steps)), 8)


def full_steps(rows: Sequence[Row]) -> list[int]:
    return [i for i, row in enumerate(rows) if "C" not in (row.sites or "")]


def test_taylorseer_decides_like_the_installed_diffusers() -> None:
    """The hook's own counter, step by step."""
    hooks = pytest.importorskip("diffusers.hooks.taylorseer_cache")
    states = pytest.importorskip("diffusers.hooks.hooks")
    for interval, warmup, cooldown in ((5, 3, None), (3, 1, None), (4, 2, 13)):
        manager = states.StateManager(hooks.TaylorSeerState, init_kwargs={"max_order": 1})
        manager.set_context(SimpleNamespace(name="test"))
        hook = hooks.TaylorSeerCacheHook(interval, warmup, torch.float32, manager, cooldown)
        decided = [i for i in range(20) if hook._measure_should_compute()[0]]
        ours = taylorseer_diffusers(target(20), interval=interval, warmup=warmup, cooldown=cooldown)
        assert full_steps(ours) == decided


def test_pab_decides_like_the_installed_diffusers() -> None:
    hooks = pytest.importorskip("diffusers.hooks.pyramid_attention_broadcast")
    state = hooks.PyramidAttentionBroadcastState()
    now, fresh = [0.0], [0]
    hook = hooks.PyramidAttentionBroadcastHook((100, 800), 3, lambda: now[0])
    hook.state = state
    hook.fn_ref = SimpleNamespace(original_forward=lambda: fresh[0])
    ours = pab(target(20), attention=3)
    for i, (t, row) in enumerate(zip(target(20).times, ours, strict=True)):
        now[0] = 1000 * t
        fresh[0] = i
        reused = hook.new_forward(None) != i
        assert reused == ("C" in (row.sites or "")), i


@pytest.mark.parametrize(("threshold", "most", "retention"), [(0.06, 3, 0.2), (0.24, 5, 0.1), (0.025, 2, 0.0)])
def test_magcache_decides_like_the_installed_diffusers(threshold: float, most: int, retention: float) -> None:
    hooks = pytest.importorskip("diffusers.hooks.mag_cache")
    states = pytest.importorskip("diffusers.hooks.hooks")
    config = hooks.MagCacheConfig(threshold, most, retention, 28, FLUX)
    manager = states.StateManager(hooks.MagCacheState)
    manager.set_context(SimpleNamespace(name="test"))
    hook = hooks.MagCacheHeadHook(manager, config)
    hook._metadata = SimpleNamespace(
        hidden_states_argument_name="x",
        return_encoder_hidden_states_index=None,
        _get_parameter_from_args_kwargs=lambda name, args, kwargs: args[0],
    )
    hook.fn_ref = SimpleNamespace(original_forward=lambda x: x)
    state = manager.get_state()
    decided = []
    for i in range(28):
        state.step_index = i
        hook.new_forward(None, torch.ones(1, 1, 1))
        if state.should_compute:
            state.previous_residual = torch.ones(1, 1, 1)  # what the last block's hook keeps
            decided.append(i)
    ours = full_steps(magcache(target(28), ratios=FLUX, threshold=threshold, max_run=most, retention=retention))
    assert ours == decided
