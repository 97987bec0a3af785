"""ProgramScheduler inside diffusers' own pipelines, against diffusers' own schedulers.

Tolerances: diffusers keeps float32 tables and float32 states, so equal algebra agrees to float32 roundings (1e-4 of the
result's spread at most, mostly 1e-6). Where a diffusers class rounds fractional timesteps for the network (its
DPM-Solver does with Karras and flow sigmas) Pliant asks the network at the exact time, and 3e-2 is stated.
"""

import json

import pytest
import torch

from pliant.errors import ConfigError, PlanError
from pliant.solvers import SOLVERS, Output
from pliant.solvers import run as program_run
from support.pipelines import dit_pipeline, flux_pipeline, gap, run, sd3_pipeline, sd_pipeline

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from pliant.integrations import ProgramScheduler  # noqa: E402

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
LEADING = {**SD, "timestep_spacing": "leading"}
TRAILING = {**SD, "timestep_spacing": "trailing"}
EXACT, ROUNDED = 1e-4, 3e-2


def compare(build, reference, solver, tolerance=EXACT, steps=8, **options):
    pipe = build(reference)
    torch.manual_seed(5)  # DiTPipeline gives its scheduler no generator
    theirs = run(pipe, steps)
    pipe.scheduler = ProgramScheduler.from_config(reference.config, solver=solver, **options)
    torch.manual_seed(5)
    ours = run(pipe, steps)
    assert torch.equal(pipe.scheduler.timesteps.long(), reference.timesteps.long()) or tolerance != EXACT
    assert float(theirs.std()) > 0.05
    assert gap(ours, theirs) < tolerance
    return pipe


@pytest.mark.parametrize(
    ("name", "config", "solver"),
    [
        ("DDIMScheduler", {"clip_sample": False}, "ddim"),
        ("DDPMScheduler", {"clip_sample": False}, "ddpm"),
        ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}, "ddpm"),
        ("DPMSolverMultistepScheduler", {}, "dpmpp-2m"),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, {"name": "dpmpp-2m", "fit": "lagrange"}),
    ],
)
def test_dit(name, config, solver):
    compare(dit_pipeline, getattr(diffusers, name)(**config), solver)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("name", "config", "solver"),
    [
        ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}, "ddim"),
        ("DPMSolverMultistepScheduler", {}, "dpmpp-2m"),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}, "dpmpp-2m"),
    ],
)
def test_stable_diffusion(name, config, solver, kind):
    reference = getattr(diffusers, name)(prediction_type=kind, **{**SD, **config})
    if config.get("final_sigmas_type") == "sigma_min":  # with 8 steps diffusers also lowers the last step's order
        solver = {"name": solver, "lower_order_final": True}
    compare(sd_pipeline, reference, solver)


@pytest.mark.parametrize(
    ("name", "config", "solver"),
    [
        ("UniPCMultistepScheduler", {}, "unipc-2"),
        ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc-3"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp-3m-published"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "sde-dpmpp-2m"),
        ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}, "plms"),
        ("LMSDiscreteScheduler", {"timestep_spacing": "leading"}, "lms-4"),
        ("HeunDiscreteScheduler", {"timestep_spacing": "leading"}, "heun-edm"),
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading"}, "euler-ancestral"),
    ],
)
def test_stable_diffusion_with_the_catalogue(name, config, solver):
    rule = "dpm" if "Multistep" in name else "ddim"
    reference = getattr(diffusers, name)(**{**SD, **config})
    tolerance = 2e-3 if solver == "lms-4" else EXACT  # diffusers integrates its coefficients numerically
    compare(sd_pipeline, reference, solver, tolerance, timestep_rule=rule)


def test_steps_offset_that_the_pipeline_corrected():
    """SD's pipeline raises an outdated steps_offset in its config; diffusers forgets that on from_config."""
    config = {k: v for k, v in SD.items() if k != "steps_offset"}
    pipe = compare(sd_pipeline, diffusers.DDIMScheduler(clip_sample=False, **config), "ddim")
    assert pipe.scheduler.config.steps_offset == 1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("flow", [False, True])
def test_every_solver_is_what_it_is_in_our_loop(solver, flow):
    """The loop of a pipeline, whose states live outside, gives what the interpreter gives."""
    kind = "flow_prediction" if flow else "epsilon"
    try:
        scheduler = ProgramScheduler(solver=solver, prediction_type=kind)
        scheduler.set_timesteps(5)
    except PlanError:
        assert solver in ("angle-ab-2", "edm-churn") and flow
        return
    noise, weight = {}, torch.linspace(-0.3, 0.5, 4)

    def network(x, t):
        return torch.tanh(x * weight + t / 1000)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 1, 4, generator=generator)
    start, drawn = x, torch.Generator().manual_seed(1)
    if scheduler.init_noise_sigma != 1.0:  # churn before the first call: not the same random numbers
        return
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), t, x, generator=drawn).prev_sample
    again = torch.Generator().manual_seed(1)

    def slot(k):
        return noise.setdefault(k, torch.randn(start.shape, generator=again))

    def evaluate(x, op):
        return Output(network(x, float(scheduler.network_time.encode(torch.tensor(op.node.t)))))

    for result in program_run(scheduler.program, start, evaluate, slot):
        expected = result.x
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sigmas", ["none", "karras", "exponential"])
def test_diffusers_euler_is_ddim(sigmas):
    """Euler on diffusers' scaled states is the same map as first-order exponential integration."""
    options = {} if sigmas == "none" else {f"use_{sigmas}_sigmas": True}
    compare(sd_pipeline, diffusers.EulerDiscreteScheduler(**LEADING, **options), "ddim", timestep_rule="ddim")


def test_karras_where_diffusers_rounds_timesteps():
    reference = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, **SD)
    compare(sd_pipeline, reference, "dpmpp-2m", ROUNDED)


@pytest.mark.parametrize("build", [flux_pipeline, sd3_pipeline])
@pytest.mark.parametrize("solver", ["euler", "ddim"])
@pytest.mark.parametrize(
    "config", [{}, {"shift": 3.0}, {"shift": 3.0, "use_karras_sigmas": True}, {"shift_terminal": 0.1}]
)
def test_flow(build, solver, config):
    compare(build, diffusers.FlowMatchEulerDiscreteScheduler(**config), solver)


def test_flow_with_dynamic_shift():
    pipe = compare(flux_pipeline, diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "euler")
    with pytest.raises(PlanError, match="pass mu"):
        pipe.scheduler.set_timesteps(4)


def test_flow_heun_shows_every_call_as_a_timestep():
    pipe = compare(sd3_pipeline, diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0), "heun")
    assert len(pipe.scheduler.timesteps) == 15 and pipe.scheduler.order == 2


def test_flow_dpm_solver_where_diffusers_truncates_timesteps():
    reference = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    compare(sd3_pipeline, reference, "dpmpp-2m", ROUNDED)


def test_higher_order_solvers_are_closer_to_the_limit():
    """The point of it all: in a pipeline whose scheduler was Euler, DPM-Solver++ needs fewer steps."""
    reference = diffusers.DDIMScheduler(clip_sample=False, **SD)
    pipe = sd_pipeline(reference)
    pipe.scheduler = ProgramScheduler.from_config(reference.config, solver="dpmpp-2m", timestep_spacing="linspace")
    limit = run(pipe, 100)
    second = gap(run(pipe, 20), limit)
    pipe.scheduler = ProgramScheduler.from_config(
        reference.config, solver="ddim", timestep_spacing="linspace", timestep_rule="dpm"
    )
    assert second < 0.5 * gap(run(pipe, 20), limit)


# Starting in the middle, configs and files ------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "heun"])
def test_image_to_image(solver):
    """strength=0.5 skips half of the steps; multistep solvers warm up again, so a fresh run equals it."""
    from diffusers import StableDiffusionImg2ImgPipeline

    reference = diffusers.DDIMScheduler(clip_sample=False, **SD)
    pipe = sd_pipeline(reference, StableDiffusionImg2ImgPipeline)
    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = run(pipe, 8, image=image, strength=0.5)
    pipe.scheduler = ProgramScheduler.from_config(reference.config, solver=solver, timestep_rule="ddim")
    ours = run(pipe, 8, image=image, strength=0.5)
    if solver == "ddim":
        assert gap(ours, theirs) < EXACT
    else:
        assert 1e-4 < gap(ours, theirs) < 2.0  # another solver, the same picture


def test_starting_in_the_middle_warms_up_again():
    fresh, midway = (ProgramScheduler(timestep_spacing="linspace") for _ in range(2))
    midway.set_timesteps(8)
    fresh.set_timesteps(timesteps=midway.timesteps[3:])
    midway.set_begin_index(3)
    outputs = torch.randn(5, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    a = b = torch.ones(1, 2, 4, 4)
    for k, m in enumerate(outputs):
        a = fresh.step(m, fresh.timesteps[k], a).prev_sample
        b = midway.step(m, midway.timesteps[3 + k], b).prev_sample
    assert torch.equal(a, b)


def test_the_sample_that_is_passed_in_counts():
    """Inpainting pipelines overwrite the state between calls; the next update must start from theirs."""
    scheduler = ProgramScheduler(solver="ddim")
    scheduler.set_timesteps(4)
    zero = torch.zeros(1, 1, 2, 2)
    scheduler.step(zero, scheduler.timesteps[0], torch.ones_like(zero))
    out = scheduler.step(zero, scheduler.timesteps[1], 3.0 * torch.ones_like(zero)).prev_sample
    level = scheduler.alphas_cumprod[scheduler.timesteps[1:3]]
    torch.testing.assert_close(out, torch.full_like(zero, 3.0 * float((level[1] / level[0]).sqrt())))


def test_noise_is_added_as_diffusers_does():
    t = torch.tensor([0, 10, 500, 999])
    x, noise = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    for config in ({}, SD, {"beta_schedule": "squaredcos_cap_v2"}):
        theirs = diffusers.DDIMScheduler(**config).add_noise(x, noise, t)
        torch.testing.assert_close(ProgramScheduler.from_config(config).add_noise(x, noise, t), theirs)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = ProgramScheduler.from_config(flow.config)
    for scheduler in (flow, ours):
        scheduler.set_timesteps(4)
    t = flow.timesteps
    torch.testing.assert_close(ours.scale_noise(x, t, noise), flow.scale_noise(x, t, noise))


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_tables(schedule, zero_snr):
    config = {"beta_schedule": schedule, "beta_start": 0.0005, "beta_end": 0.015, "rescale_betas_zero_snr": zero_snr}
    theirs, ours = diffusers.DDPMScheduler(**config), ProgramScheduler.from_config(config)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
    assert (float(ours.alphas_cumprod[-1]) == 0.0) == zero_snr


def walk(scheduler, steps=6, seed=0, **options):
    """The final sample for fixed network outputs."""
    scheduler.set_timesteps(steps)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 4, 4, generator=g)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.randn(x.shape, generator=g), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize(
    "config",
    [
        {"clip_sample": True, "clip_sample_range": 1.5},
        {"clip_sample": False, "thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9},
        {"clip_sample": False, "beta_schedule": "squaredcos_cap_v2"},
        {"clip_sample": False, "trained_betas": [0.01 + 2e-4 * k for k in range(100)], "num_train_timesteps": 100},
        {"clip_sample": False, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
         "timestep_spacing": "trailing"},
    ],
)  # fmt: skip
def test_clipping_and_other_tables(config):
    reference = diffusers.DDIMScheduler(**config)
    # clip_sample=True is diffusers' default and so not in what from_config passes on.
    ours = ProgramScheduler.from_config(reference.config, solver="ddim", clip_sample=config["clip_sample"])
    assert gap(walk(ours, 5), walk(reference, 5, use_clipped_model_output=True)) < 1e-4


@pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small", "fixed_large"])
def test_ddpm_with_learned_variance(variance_type):
    """Outputs with twice the channels carry the variance; a network without it uses one of the fixed ones."""
    reference = diffusers.DDPMScheduler(clip_sample=False, variance_type=variance_type)
    ours = ProgramScheduler.from_config(reference.config, solver="ddpm")
    channels, finals = 6 if variance_type == "learned_range" else 3, []
    for scheduler in (ours, reference):
        scheduler.set_timesteps(6)
        g, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
        x = torch.randn(2, 3, 4, 4, generator=g)
        for t in scheduler.timesteps:
            out = torch.tanh(torch.randn(2, channels, 4, 4, generator=g))
            x = scheduler.step(out, t, x, generator=noise).prev_sample
        finals.append(x)
    assert gap(*finals) < EXACT
    if channels == 6:
        ours.set_timesteps(3)
        with pytest.raises(PlanError, match="returned none"):
            ours.step(x, ours.timesteps[0], x)


def test_custom_timesteps_and_sigmas():
    chosen = [999, 850, 600, 300, 40]
    reference = diffusers.DPMSolverMultistepScheduler(**SD)
    pipe = sd_pipeline(reference)
    theirs = run(pipe, None, timesteps=chosen)
    pipe.scheduler = ProgramScheduler.from_config(reference.config, solver="dpmpp-2m")
    assert gap(run(pipe, None, timesteps=chosen), theirs) < EXACT
    assert pipe.scheduler.timesteps.tolist() == chosen
    ratios = pipe.scheduler.sigmas.tolist()
    assert len(ratios) == 6 and ratios[-1] == 0.0
    again = run(pipe, None, sigmas=ratios)
    assert gap(again, theirs) < 1e-3  # sigmas are float32


def test_generators_make_noise_reproducible():
    ours = ProgramScheduler(solver={"name": "ddim", "eta": 1.0})
    theirs = diffusers.DDIMScheduler(clip_sample=False)
    a, b, c = (walk(ours, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert gap(a, walk(theirs, generator=torch.Generator().manual_seed(0), eta=1.0)) < EXACT


def test_config_round_trip(tmp_path):
    ours = ProgramScheduler.from_config(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0).config, solver={"name": "heun", "last": "euler"}
    )
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "ProgramScheduler" and saved["prediction_type"] == "flow_prediction"
    again = ProgramScheduler.from_pretrained(tmp_path)
    assert torch.equal(walk(again), walk(ours))
    back = diffusers.FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    assert back.config.shift == 2.0


def test_pipeline_folder_round_trip(tmp_path):
    pipe = dit_pipeline(ProgramScheduler(solver="dpmpp-2m"))
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.scheduler, ProgramScheduler)
    assert torch.equal(run(again, 4), run(pipe, 4))


def test_pipelines_in_bfloat16_and_callbacks():
    pipe = sd_pipeline(ProgramScheduler(solver="dpmpp-2m", **SD)).to(torch.bfloat16)
    seen = []
    words = torch.randn(1, 7, 16, dtype=torch.bfloat16)

    def note(pipe, i, t, tensors):
        seen.append((i, int(t), tensors["latents"].dtype))
        return tensors

    pipe(
        prompt_embeds=words, negative_prompt_embeds=-words, num_inference_steps=3, output_type="latent",
        callback_on_step_end=note,
    )  # fmt: skip
    assert [s[0] for s in seen] == [0, 1, 2] and {s[2] for s in seen} == {torch.bfloat16}


def test_runs_repeat_on_the_same_grid():
    scheduler = ProgramScheduler()
    a = walk(scheduler)
    assert torch.equal(a, walk(scheduler))


def test_bad_input():
    with pytest.raises(PlanError, match="dpmpp-2m"):
        ProgramScheduler(solver="dpmpp2m")
    with pytest.raises(ConfigError, match="prediction_type"):
        ProgramScheduler(prediction_type="eps")
    with pytest.raises(ConfigError, match="EDM"):
        ProgramScheduler.from_config(diffusers.EDMEulerScheduler().config)
    with pytest.raises(ConfigError, match="stochastic"):
        ProgramScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True).config)
    with pytest.raises(ConfigError, match="timestep_spacing"):
        ProgramScheduler(timestep_spacing="trailling").set_timesteps(4)
    scheduler = ProgramScheduler()
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(PlanError, match="set_timesteps"):
        scheduler.step(x, 1, x)
    with pytest.raises(PlanError, match="1000"):
        scheduler.set_timesteps(1001)
    with pytest.raises(PlanError, match="number of steps"):
        scheduler.set_timesteps()
    scheduler.set_timesteps(4)
    with pytest.raises(PlanError, match="does not begin a step"):
        scheduler.step(x, 1, x)
