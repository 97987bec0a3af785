"""diffusers' transformers as sites: bit-equal to their own forward, and caches inside real pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.compute import Cache, Compute, Gate, Moment, Reuse
from pliant.compute.executor import Call
from pliant.compute.lowering import lower
from pliant.errors import ConfigError, FormatError, PlanError
from support.cli import refused, run_here
from support.pipelines import _shaken, dit_pipeline, flux_pipeline, run, sd3_pipeline

diffusers = pytest.importorskip("diffusers")

from pliant.integrations import SiteTransformer, cached, sites_of  # noqa: E402
from pliant.integrations.diffusers_clock import SchedulerClock  # noqa: E402
from pliant.integrations.sites.schedule import cache_schedule  # noqa: E402

STEPS = 10


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dit() -> tuple[Any, dict[str, Any]]:
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    return net, {
        "hidden_states": draw(2, 4, 8, 8),
        "timestep": torch.tensor([500, 20]),
        "class_labels": torch.tensor([1, 7]),
    }


def pixart() -> tuple[Any, dict[str, Any]]:
    net = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        cross_attention_dim=16, caption_channels=12, patch_size=2,
    )  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return net, {
        "hidden_states": draw(2, 4, 8, 6),
        "encoder_hidden_states": draw(2, 5, 12),
        "timestep": torch.tensor([500, 20]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": mask,
    }


def sd3(dual: tuple[int, ...] = (), qk_norm: str | None = None) -> tuple[Any, dict[str, Any]]:
    net = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=20, out_channels=4,
        dual_attention_layers=dual, qk_norm=qk_norm,
    )  # fmt: skip
    return net, {
        "hidden_states": draw(2, 4, 8, 6),
        "encoder_hidden_states": draw(2, 5, 12),
        "pooled_projections": draw(2, 20),
        "timestep": torch.tensor([500.0, 20.0]),
    }


def flux(guidance: bool = False) -> tuple[Any, dict[str, Any]]:
    net = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=20, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance,
    )  # fmt: skip
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(3.0))
    return net, {
        "hidden_states": draw(2, 12, 8),
        "encoder_hidden_states": draw(2, 5, 12),
        "pooled_projections": draw(2, 20),
        "timestep": torch.tensor([0.5, 0.02]),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.tensor([3.5, 1.0]) if guidance else None,
    }


def lumina2() -> tuple[Any, dict[str, Any]]:
    net = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=3, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(30, 8, 8),
        cap_feat_dim=12,
    )  # fmt: skip
    return net, {
        "hidden_states": draw(2, 4, 8, 6),
        "timestep": torch.tensor([0.5, 0.02]),
        "encoder_hidden_states": draw(2, 5, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool(),
    }


def lumina_next() -> tuple[Any, dict[str, Any]]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    net = diffusers.LuminaNextDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=3, num_attention_heads=4,
        num_kv_heads=2, multiple_of=8, cross_attention_dim=12, learn_sigma=False,
    )  # fmt: skip
    return net, {
        "hidden_states": draw(2, 4, 8, 8),
        "timestep": torch.tensor([0.5, 0.02]),
        "encoder_hidden_states": draw(2, 5, 12),
        "encoder_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 384, 384),
        "cross_attention_kwargs": {},
    }


MODELS = {
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "sd3.5": lambda: sd3((0, 1), "rms_norm"),
    "flux": flux,
    "flux-guided": lambda: flux(True),
    "lumina2": lumina2,
    "lumina-next": lumina_next,
}


def prepared(name: str) -> tuple[Any, dict[str, Any], Tensor]:
    """A model with weights that hide nothing, inputs, and its own answer."""
    torch.manual_seed(0)
    net, inputs = MODELS[name]()
    _shaken(net, std=0.5)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim <= 1:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        return net.requires_grad_(False), inputs, net(**inputs).sample


@contextmanager
def named(network: Any, name: str = "cond") -> Iterator[None]:
    """What pipelines with `cache_context` do for diffusers' own hooks."""
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    _set_cache_context(network, CacheContext(name))
    try:
        yield
    finally:
        _set_cache_context(network, None)


@pytest.mark.parametrize("name", MODELS)
def test_running_all_sites_is_the_transformer_bit_for_bit(name: str) -> None:
    """Whole blocks, single sites, and spans that are kept from site to site."""
    net, inputs, want = prepared(name)
    sites = len(sites_of(net).sites)
    for write in ((), ("branch",), tuple(f"span({s},{s + 1})" for s in range(sites)), ("out",), ("state",)):
        network = SiteTransformer(net, [Compute(write=write)])
        got = network(**inputs).sample
        assert torch.equal(got, want), write
    assert torch.equal(SiteTransformer(net, [Compute()])(**inputs, return_dict=False)[0], want)


@pytest.mark.parametrize("name", MODELS)
def test_reusing_in_the_same_moment_changes_nothing(name: str) -> None:
    """A second call with the same inputs, from kept branches, spans or the output."""
    net, inputs, want = prepared(name)
    m = len(sites_of(net).sites)
    full = Compute(write=("branch", f"span(0,{m})", "out"))
    for again in (Compute(sites=f"C{m}", reuse=Reuse("branch")), Compute(sites=f"C{m}", reuse=Reuse("out"))):
        network = SiteTransformer(net, [full, again], Ticks())
        network(**inputs)
        assert torch.equal(network(**inputs).sample, want)
    network = SiteTransformer(net, [full, Compute(sites=f"C{m}", reuse=Reuse("span"))], Ticks())
    network(**inputs)
    torch.testing.assert_close(network(**inputs).sample, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_decide_differently_run_as_two_batches(name: str) -> None:
    """Row 0 changes, row 1 does not: each gets what it would get alone."""
    net, inputs, _ = prepared(name)
    m = len(sites_of(net).sites)
    compute = Compute(write=(f"span(1,{m})",), reuse=Reuse("span"), gate=Gate(0.01, f"R1C{m - 1}", 1))
    moved = {**inputs, "hidden_states": inputs["hidden_states"].clone()}
    moved["hidden_states"][0] += draw(*inputs["hidden_states"].shape[1:], seed=5)
    network = SiteTransformer(net, [compute] * 2, Ticks())
    first = network(**inputs).sample
    second = network(**moved).sample
    assert network.decisions[1].hit == (False, True)
    torch.testing.assert_close(second[0], net(**moved).sample[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second[1], first[1], rtol=1e-5, atol=1e-5)


class Ticks:
    """Every call is a step."""

    def __init__(self) -> None:
        self.times, self.calls = (0.9, 0.5, 0.1), -1

    def step(self, timestep: Tensor) -> int:
        self.calls += 1
        return self.calls

    def moment(self, step: int) -> Moment:
        return Moment(step, self.times[step], float(step))


def test_a_site_alone_is_norm_inner_and_add() -> None:
    """The protocol itself, on the model with three-part branches."""
    net, inputs, want = prepared("sd3.5")
    sites, given = sites_of(net), {**dict.fromkeys(("joint_attention_kwargs",)), **inputs}
    x = given.pop("hidden_states")
    state, context = sites.begin(x, given)
    for s in range(len(sites.sites)):
        branch = sites.inner(s, sites.norm(s, state, context), context)
        state = sites.add(s, state, branch, context)
    assert torch.equal(sites.head(state, context), want)
    call = Call(lower(Compute(sites="R6"), 6), sites, Cache(), "net", ("cond",), Moment(0, 1.0, 0.0))
    assert torch.equal(call(x, given), want)


# Pipelines ------------------------------------------------------------------------------------------------------------


def flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def ddim() -> Any:
    return diffusers.DDIMScheduler(clip_sample=False)


def deeper(pipe: Any) -> Any:
    """The same pipeline around a deeper transformer: caches need blocks."""
    kind = type(pipe.transformer)
    config = dict(pipe.transformer.config) | {"num_layers": 4}
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    if "num_single_layers" in config:
        config |= {"num_layers": 2, "num_single_layers": 2}
    torch.manual_seed(0)
    net = _shaken(kind(**config), std=0.5)
    pipe.transformer = net.requires_grad_(False)
    return pipe


def make(kind: str) -> Any:
    return deeper({"dit": dit_pipeline, "sd3": sd3_pipeline, "flux": flux_pipeline}[kind](
        ddim() if kind == "dit" else flow()
    ))  # fmt: skip


def made(pipe: Any, **options: Any) -> Tensor:
    """DiT: one image without guidance, so that a batch is one row."""
    if type(getattr(pipe, "pipe", pipe)).__name__ == "DiTPipeline":
        generator = torch.Generator().manual_seed(1)
        options = {"guidance_scale": 1.0, "output_type": "np", "generator": generator, **options}
        return torch.from_numpy(pipe([1], num_inference_steps=STEPS, **options).images)
    words, pooled = draw(1, 7, 16, seed=3), draw(1, 16, seed=4)
    options = {"generator": torch.Generator().manual_seed(1), "guidance_scale": 1.0, "output_type": "latent", **options}
    return pipe(
        prompt_embeds=words, pooled_prompt_embeds=pooled, height=8, width=8, num_inference_steps=STEPS, **options
    ).images


PRESETS = {
    "fbc": {"threshold": 0.05},
    "dbcache": {"threshold": 0.1, "front": 1, "back": 1, "warmup": 2},
    "teacache": {"threshold": 0.1},
    "easycache": {"threshold": 0.1, "warmup": 2},
    "fora": {"interval": 3},
    "deepcache": {"interval": 2},
    "delta-dit": {"interval": 2},
    "pab": {"attention": 2},
    "fastercache": {},
    "taylorseer": {"interval": 3, "order": 2},
    "taylorseer-diffusers": {"interval": 3, "warmup": 2},
    "spectrum": {"warmup": 3},
    "magcache": {"ratios": [1.0] * 5, "threshold": 0.1},
}


@pytest.mark.parametrize("kind", ["dit", "sd3", "flux"])
def test_every_preset_runs_in_a_pipeline_and_leaves_it_as_it_was(kind: str) -> None:
    pipe = make(kind)
    want = made(pipe)
    for name, options in PRESETS.items():
        fast = cached(pipe, name, **options)
        got = made(fast)
        assert any(c.reads() for c in fast.computes), name
        assert torch.isfinite(got).all(), name
        if "threshold" not in options:  # fixed places: something was reused
            assert not torch.equal(got, want), name
        assert torch.equal(made(fast), got), name  # the second request knows nothing of the first
    assert type(pipe.transformer).__name__ in pipe.config["transformer"]
    assert torch.equal(made(pipe), want)


@pytest.mark.parametrize("kind", ["dit", "sd3", "flux"])
def test_a_threshold_of_zero_is_the_pipeline(kind: str) -> None:
    """And one that nothing passes, with a gate that looks every time."""
    pipe = make(kind)
    want = made(pipe)
    for name, threshold in (("fbc", 0.0), ("fbc", 1e-9), ("teacache", 1e-9), ("dbcache", 1e-9)):
        options = {"front": 1, "warmup": 2} if name == "dbcache" else {}
        assert torch.equal(made(cached(pipe, name, threshold=threshold, **options)), want)


def test_guidance_in_one_batch_or_in_two_calls() -> None:
    """DiT batches both streams, FLUX calls twice per step: all steps full is the pipeline, bit for bit."""
    for kind, options in (("dit", {"guidance_scale": 3.0}), ("flux", {"true_cfg_scale": 2.0})):
        pipe = make(kind)
        if kind == "flux":
            options |= {"negative_prompt_embeds": draw(1, 7, 16, seed=8)}
            options |= {"negative_pooled_prompt_embeds": draw(1, 16, seed=9)}
        fast = cached(pipe, "fbc", threshold=1e-9)
        assert torch.equal(made(fast, **options), made(pipe, **options))
        names = {d.streams for d in fast.decisions}
        assert names == ({("cond",)} if kind == "dit" else {("cond",), ("null",)})
        assert len(fast.decisions) == STEPS * len(names)
        made(cached(pipe, "fora", interval=2), **options)


def test_the_conditional_rows_decide_where_a_rule_says_so() -> None:
    pipe = make("dit")
    fast = cached(pipe, "easycache", threshold=1.0, warmup=2, streams=("cond", "null"))
    made(fast, guidance_scale=3.0)
    assert all(d.hit[0] == d.hit[1] for d in fast.decisions)
    assert any(d.hit[0] for d in fast.decisions)


@pytest.mark.parametrize("scheduler", ["heun", "pndm", "dpm", "img2img"])
def test_steps_are_the_scheduler_s(scheduler: str) -> None:
    """Two evaluations per step, a timestep asked twice, a late entry: each is one compute further."""
    if scheduler == "img2img":
        pipe = make("sd3")
        pipe = diffusers.StableDiffusion3Img2ImgPipeline(**{k: v for k, v in pipe.components.items() if k in (
            "transformer", "scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2",
            "text_encoder_3", "tokenizer_3")})  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        options: dict[str, Any] = {"image": draw(1, 4, 8, 8), "strength": 0.5}
        fast = cached(pipe, "fora", interval=2)
        made(fast, **options)
        assert len(fast.computes) == STEPS // 2
        return
    kinds = {"heun": "HeunDiscreteScheduler", "pndm": "PNDMScheduler", "dpm": "DPMSolverMultistepScheduler"}
    pipe = make("dit")
    pipe.scheduler = getattr(diffusers, kinds[scheduler])()
    fast = cached(pipe, "fbc", threshold=1e-9)
    assert torch.equal(made(fast), made(pipe))
    assert [d.step for d in fast.decisions] == list(range(len(fast.decisions)))
    assert len(fast.decisions) == len(fast.computes)


def test_interleaved_requests_with_different_plans_are_separate_runs() -> None:
    net = make("dit").transformer
    scheduler = ddim()
    scheduler.set_timesteps(STEPS)
    sites = sites_of(net)
    times = [float(t) / 1000 for t in scheduler.timesteps]
    plans = [cache_schedule(sites, times, "fbc", threshold=0.1), cache_schedule(sites, times, "taylorseer", interval=3)]

    def states(k: int) -> Tensor:
        return draw(1, 4, 8, 8, seed=k)

    def step(network: Any, x: Tensor, t: Tensor) -> Tensor:
        out = network(x, timestep=t[None], class_labels=torch.tensor([1])).sample[:, :4]
        return scheduler.step(out, t, x).prev_sample

    alone = []
    for k, plan in enumerate(plans):
        network, x = SiteTransformer(net, plan), states(k)
        for t in scheduler.timesteps:
            x = step(network, x, t)
        alone.append(x)
    networks, xs = [SiteTransformer(net, plan) for plan in plans], [states(0), states(1)]
    for t in scheduler.timesteps:
        xs = [step(network, x, t) for network, x in zip(networks, xs, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(alone, xs, strict=True))
    with pytest.raises(PlanError, match="one SiteTransformer is one request"):
        step(networks[0], xs[0], torch.tensor(3))


# Peers ----------------------------------------------------------------------------------------------------------------


def counted(pipe: Any, block: Any) -> tuple[Tensor, list[int]]:
    """The pipeline's images, and the steps in which a block really ran."""
    steps: list[int] = []
    calls = [0]
    handles = [
        pipe.transformer.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1)),
        block.register_forward_hook(lambda *_: steps.append(calls[0] - 1)),
    ]
    try:
        return made(pipe), steps
    finally:
        for handle in handles:
            handle.remove()


def with_hooks(pipe: Any, apply: Any) -> tuple[Tensor, list[Any]]:
    """diffusers' hooks on a deep copy of the transformer: images, and outputs of the third block's attention."""
    import copy

    own = copy.copy(pipe)
    own.__dict__["transformer"] = copy.deepcopy(pipe.transformer)
    apply(own.transformer)
    with named(own.transformer):
        return made(own), []


def hits(pipe: Any, config: Any) -> tuple[Tensor, list[bool]]:
    """Images and hits of diffusers' first-block cache, as it decided them."""
    import copy

    from diffusers.hooks import first_block_cache

    own = copy.copy(pipe)
    own.__dict__["transformer"] = copy.deepcopy(pipe.transformer)
    first_block_cache.apply_first_block_cache(own.transformer, config)
    head = next(iter(own.transformer.transformer_blocks))
    hook = head._diffusers_hook.hooks["fbc_leader_block_hook"]
    decided: list[bool] = []
    ask = hook._should_compute_remaining_blocks
    hook._should_compute_remaining_blocks = lambda x: (decided.append(not ask(x)), not decided[-1])[1]
    with named(own.transformer):
        return made(own), decided


@pytest.mark.parametrize("kind", ["dit", "flux"])
def test_first_block_cache_decides_and_answers_like_diffusers(kind: str) -> None:
    pipe = make(kind)
    seen = set()
    for threshold in (0.3, 0.5, 0.8, 0.99):  # random networks change a lot per step
        want, theirs = hits(pipe, diffusers.FirstBlockCacheConfig(threshold=threshold))
        fast = cached(pipe, "fbc", threshold=threshold)
        got = made(fast)
        ours = [d.hit[0] for d in fast.decisions]
        assert ours == theirs
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        seen.add(tuple(ours))
    assert len(seen) > 2  # the thresholds matter


def test_taylorseer_answers_like_diffusers() -> None:
    """Attention and MLP outputs, order 1, float32 factors, the published (not the exact) form of the forecast."""
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    pipe = make("dit")
    config = TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, max_order=1, taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"],
    )  # fmt: skip
    want, _ = with_hooks(pipe, lambda net: apply_taylorseer_cache(net, config))
    got = made(cached(pipe, "taylorseer-diffusers", interval=3, warmup=2, order=1, basis="taylor"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert float((want - made(pipe)).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["dit", "flux"])
def test_magcache_answers_like_diffusers(kind: str) -> None:
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    pipe = make(kind)
    ratios = [1.0, 1.05, 0.97, 1.02, 0.98, 1.01, 0.96, 1.03, 0.99, 0.9]
    config = MagCacheConfig(threshold=0.06, max_skip_steps=2, num_inference_steps=STEPS, mag_ratios=ratios)
    want, _ = with_hooks(pipe, lambda net: apply_mag_cache(net, config))
    got = made(cached(pipe, "magcache", ratios=ratios, threshold=0.06, max_run=2))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert float((want - made(pipe)).abs().max()) > 1e-3


def test_pab_answers_like_diffusers() -> None:
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    pipe = make("dit")
    now = [0]

    def apply(net: Any) -> None:
        net.register_forward_pre_hook(
            lambda _, args, kwargs: now.__setitem__(0, int(kwargs["timestep"][0])), with_kwargs=True
        )
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 800),
            current_timestep_callback=lambda: now[0],
        )  # fmt: skip
        apply_pyramid_attention_broadcast(net, config)

    want, _ = with_hooks(pipe, apply)
    got = made(cached(pipe, "pab", attention=2, low=0.1, high=0.8))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert float((want - made(pipe)).abs().max()) > 1e-3


# Errors ---------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_honoured_is_refused() -> None:
    pipe = make("dit")
    net = pipe.transformer
    with pytest.raises(ConfigError, match="no caching preset 'fbk'"):
        cached(pipe, "fbk")
    with pytest.raises(ConfigError, match="no option 'treshold'"):
        cached(pipe, "fbc", treshold=0.1)
    with pytest.raises(PlanError, match="step 0: reuses"):
        cached(pipe, [Compute(sites="C8", reuse=Reuse("out"))])
    with pytest.raises(PlanError, match="step 1: sites 'R6'"):
        SiteTransformer(net, [Compute(), Compute(sites="R6")])
    with pytest.raises(PlanError, match="step 0 asks for patch 4x4"):
        SiteTransformer(net, [Compute(patch=(4, 4))])
    with pytest.raises(PlanError, match="Pliant's own DiT"):
        made(cached(pipe, "icc", interval=2))
    with pytest.raises(FormatError, match="no list of sites for Linear"):
        sites_of(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="needs a clock"):
        SiteTransformer(net, lambda sites, times: [])
    network, inputs = SiteTransformer(net, [Compute()]), {"timestep": torch.tensor([3]), "class_labels": None}
    with pytest.raises(TypeError, match="needs hidden_states"):
        network(**inputs)
    with pytest.raises(TypeError, match="takes hidden_states, timestep"):
        network(draw(1, 4, 8, 8), step=3)
    sd3_net, given = MODELS["sd3"]()
    with pytest.raises(PlanError, match="skip_layers changes"):
        SiteTransformer(sd3_net, [Compute()])(**given, skip_layers=[1])
    with pytest.raises(PlanError, match="LoRA scale"):
        SiteTransformer(sd3_net, [Compute()])(**given, joint_attention_kwargs={"scale": 0.5})
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(net, FirstBlockCacheConfig())
    with pytest.raises(ConfigError, match="has hooks"):
        SiteTransformer(net, [Compute()])


def test_a_site_transformer_passes_for_the_transformer() -> None:
    net = make("flux").transformer
    network = SiteTransformer(net, [Compute()])
    assert network.config is net.config and network.dtype == net.dtype and network.device == net.device
    assert network.attn_processors.keys() == net.attn_processors.keys()
    with network.cache_context("cond"):
        pass
    assert [s.kind for s in sites_of(net).sites] == ["attention", "mlp", "attention", "mlp", "block", "block"]
    assert SchedulerClock(flow()).times == ()


def test_run_helper_still_runs() -> None:
    """The guided SD3 pipeline of the other tests, uncond first in one batch."""
    pipe = make("sd3")
    want = run(pipe, 4)
    assert torch.equal(run_with(cached(pipe, "fbc", threshold=0.0)), want)


def run_with(pipe: Any) -> Tensor:
    own = pipe.request()
    return run(own, 4)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "dit"])
@pytest.mark.parametrize("inside", ["", "transformer"])
def test_a_folder_says_its_sites(name: str, inside: str, tmp_path: Path) -> None:
    """Of a transformer or of a pipeline, from the configuration alone."""
    from pliant.integrations.sites.folder import read_transformer

    net, _ = MODELS[name]()
    net.save_config(tmp_path / inside)
    found = read_transformer(tmp_path)
    assert found is not None and found.name == type(net).__name__
    assert found.sites == tuple((site.kind, site.block) for site in sites_of(net).sites)
    assert found.parameters == sum(p.numel() for p in net.parameters())
    done = run_here("info", tmp_path, "--sites")
    assert f"{len(found.sites)} sites in {found.blocks} blocks" in done.out and "attention" in done.out
    assert run_here("info", tmp_path, "--json").json["sites"][0] == {"site": 0, "block": 0, "kind": found.sites[0][0]}
    file = tmp_path / inside / "config.json"
    file.write_text(file.read_text().replace(': 2', ': "x"'))
    refused(run_here("info", tmp_path), "config.json")


def test_other_folders_are_not_taken_for_transformers(tmp_path: Path) -> None:
    from pliant.integrations.sites.folder import read_transformer

    assert read_transformer(tmp_path) is None and read_transformer("digits") is None
    dit()[0].save_pretrained(tmp_path)
    assert read_transformer(tmp_path) is None  # Pliant reads it as its own
    (tmp_path / "config.json").write_text("[]")
    assert read_transformer(tmp_path) is None
