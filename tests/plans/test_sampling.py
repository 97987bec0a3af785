"""The loop: equal to calling the denoiser by hand, independent of batching, exact in guidance."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.guidance import Guidance
from pliant.plans import Plan, Sampler, sample, sample_steps
from pliant.plans.engine import ModulationTable
from pliant.plans.noise import seeded_noise

FP32 = Compute(precision="fp32")


def euler_by_hand(model: Denoiser, times: list[float], labels: list[int], seeds: list[int], compute: Compute):  # type: ignore[no-untyped-def]
    """The textbook loop on the public denoiser: no engine, no program."""
    x = torch.stack([seeded_noise(s, -1, model.sample_shape) for s in seeds])
    y = torch.tensor(labels)
    with torch.no_grad():
        for t, t_next in pairwise(times):
            x = x + (t_next - t) * model(x, t, y, compute).to("velocity")
    return x


@pytest.mark.parametrize("kind", ["flow", "sit"])
@pytest.mark.parametrize("patch", [None, 2, 4])
def test_engine_equals_the_plain_loop(make, kind: str, patch: int | None) -> None:
    model = make(kind)
    compute = Compute.of(patch, precision="fp32")
    plan = Plan.uniform(model, 7, "euler", compute)
    ours = sample(model, plan, [0, 4, 5], [1, 2, 3])
    torch.testing.assert_close(
        ours, euler_by_hand(model, plan.times, [0, 4, 5], [1, 2, 3], compute), atol=2e-5, rtol=1e-4
    )


def test_unmerged_adapters_give_the_same_samples(make) -> None:
    model = make("flow")
    merged = Plan.uniform(model, 4, compute=Compute.of(4, precision="fp32"))
    unmerged = Plan.uniform(model, 4, compute=Compute.of(4, merged=False, precision="fp32"))
    assert unmerged.cost(model).flops > merged.cost(model).flops
    torch.testing.assert_close(sample(model, merged, [1]), sample(model, unmerged, [1]), atol=2e-5, rtol=1e-4)


def test_a_full_compute_plan_of_a_flexible_model_is_bit_equal_to_the_original(make) -> None:
    flexible, original = make("ddpm"), make("ddpm", flexible=False)
    plan = Plan.uniform(original, 5, "ddpm", guidance=1.5)
    assert torch.equal(sample(flexible, plan, [1, 2]), sample(original, plan, [1, 2]))


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp-2m", "heun", {"name": "ddim", "eta": 1.0}])
def test_image_k_does_not_depend_on_its_batch(make, solver) -> None:  # type: ignore[no-untyped-def]
    model = make("ddpm")
    plan = Plan.weak_to_powerful(model, 8, 0.6, solver=solver, guidance=1.5, weak=Compute.of(4, precision="fp32"))
    together = sample(model, plan, [0, 1, 2, 2, 4], [10, 11, 12, 13, 14])
    pairs = sample(model, plan, [0, 1, 2, 2, 4], [10, 11, 12, 13, 14], batch_size=2)
    alone = sample(model, plan, [2], [13])
    scale = together.abs().max()
    assert (together - pairs).abs().max() / scale < 1e-5
    assert (together[3:4] - alone).abs().max() / scale < 1e-5


def test_guidance_by_hand(make) -> None:
    model = make("flow")
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    y, null = torch.tensor([1, 3]), torch.tensor([5, 5])
    weak = Compute.of(4, precision="fp32")
    with torch.no_grad():
        c, u = model(x, 1.0, y).value, model(x, 1.0, null).value
        cw, uw = model(x, 1.0, y, weak).value, model(x, 1.0, null, weak).value
    for compute, guidance, expected in [
        (FP32, Guidance.cfg(3.0), u + 3.0 * (c - u)),
        (FP32, Guidance.cfg(1.0), c),
        (FP32, Guidance.cfg(0.0), u),
        (FP32, Guidance.cfg(2.0, weak), uw + 2.0 * (c - uw)),
        (FP32, Guidance.weak_model(1.4, weak), cw + 1.4 * (c - cw)),
        (weak, Guidance.cfg(3.0), uw + 3.0 * (cw - uw)),
        (FP32, Guidance.cfg(3.0, channels=1), torch.cat([(u + 3.0 * (c - u))[:, :1], c[:, 1:]], 1)),
    ]:
        plan = Plan.uniform(model, 1, "euler", compute, guidance)
        got = sample(model, plan, [1, 3], x=x)
        torch.testing.assert_close(got, x - expected, atol=2e-5, rtol=1e-4)


def test_x0_estimates_are_the_models(make) -> None:
    model = make("ddpm", flexible=False)
    plan = Plan.uniform(model, 3, "ddim", FP32)
    states = [torch.stack([seeded_noise(7, -1, model.sample_shape)])]
    for result in sample_steps(model, plan, [2], [7]):
        t = plan.times[result.index]
        with torch.no_grad():
            expected = model(states[-1], t, torch.tensor([2])).to("sample")
        torch.testing.assert_close(result.x0, expected, atol=1e-3, rtol=1e-4)
        states.append(result.x)


def test_one_step_of_ddim_to_clean_data_returns_x0(make) -> None:
    model = make("flow", flexible=False)
    result = list(sample_steps(model, Plan.uniform(model, 1, "ddim", FP32), [2], [7]))[-1]
    torch.testing.assert_close(result.x, result.x0)


def test_modulation_tables_in_pieces_equal_the_whole(make, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make("flow", flexible=False).network
    times, labels = torch.linspace(1000, 0, 9), torch.tensor([3, 1, 3, 5])
    with torch.no_grad():
        whole = ModulationTable(network, times, labels)
        monkeypatch.setattr("pliant.plans.engine.TABLE_BYTES", 1)
        pieces = ModulationTable(network, times, labels)
        assert (whole.chunk, pieces.chunk) == (whole.chunk, 1) and whole.chunk > 9
        for k in range(9):
            direct = network.modulations(times[k].expand(4), labels)
            torch.testing.assert_close(whole.rows(k), direct, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(pieces.rows(k), direct, atol=1e-5, rtol=1e-5)


def test_bf16_is_close_and_leaves_the_model_alone(make) -> None:
    model = make("flow")
    before = {k: v.clone() for k, v in model.network.state_dict().items()}
    exact = sample(model, Plan.uniform(model, 4, compute=Compute.of(2, precision="fp32")), [1, 2])
    rough = sample(model, Plan.uniform(model, 4, compute=Compute.of(2, precision="bf16")), [1, 2])
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).norm() / exact.norm() < 0.05
    assert all(torch.equal(v, before[k]) for k, v in model.network.state_dict().items())


def test_sampling_leaves_no_graph_and_no_state(make) -> None:
    model = make("flow", flexible=False)
    sampler = Sampler(model, Plan.uniform(model, 3))
    first = sampler([1, 2], [0, 1])
    assert not first.requires_grad
    assert torch.equal(first, sampler([1, 2], [0, 1]))


@pytest.mark.parametrize(
    ("labels", "seeds", "words"),
    [
        ([6], [0], "classes 0 to 4"),
        ([-1], [0], "class -1 does not exist"),
        ([], [], "nothing to sample"),
        ([1, 2], [0], "need 2 seeds"),
        ([1], [-3], "seeds are integers"),
    ],
)
def test_bad_requests(make, labels: list[int], seeds: list[int], words: str) -> None:
    model = make("flow")
    with pytest.raises(PlanError, match=words):
        sample(model, Plan.uniform(model, 2), labels, seeds)


def test_start_state_shape_is_checked(make) -> None:
    model = make("flow")
    with pytest.raises(PlanError, match="start state"):
        sample(model, Plan.uniform(model, 2), [1], x=torch.zeros(1, 2, 8, 4))


@pytest.mark.parametrize("approach", ["joined", "rows"])
def test_packed_guidance_equals_separate_calls(make, monkeypatch: pytest.MonkeyPatch, approach: str) -> None:
    # On a GPU the two patch sizes of a weak-guided step share a pass; here the choice is forced.
    model = make("ddpm")
    weak = Compute.of(4, merged=False, precision="fp32")
    plan = Plan.uniform(model, 3, "ddim", Compute(merged=False, precision="fp32"), Guidance.weak_model(1.3, weak))
    separate = sample(model, plan, [0, 1, 2], [4, 5, 6])
    used = []
    monkeypatch.setattr("pliant.plans.engine.choose_packing", lambda *_: used.append(approach) or approach)
    packed = sample(model, plan, [0, 1, 2], [4, 5, 6])
    assert used
    assert (packed - separate).abs().max() / separate.abs().max() < 1e-4
