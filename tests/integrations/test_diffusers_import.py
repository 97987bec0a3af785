"""diffusers' schedulers as Pliant programs and plans."""

import pytest
import torch

from pliant import Plan, sample
from pliant.errors import ConfigError, PlanError
from support.networks import tiny_denoiser

diffusers = pytest.importorskip("diffusers")

from pliant.integrations import (  # noqa: E402
    ProgramScheduler,
    plan_from_scheduler,
    program_from_scheduler,
    scheduler_form,
)

# Their modules hand tensors to numpy in a way that numpy 2 discourages.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PLAIN = {"clip_sample": False}
DDPM = {"beta_start": 1e-4, "beta_end": 0.02}
SCHEDULERS = [
    ("DDIMScheduler", PLAIN),
    ("DDPMScheduler", PLAIN),
    ("LCMScheduler", PLAIN),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    ("UniPCMultistepScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("SASolverScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", DDPM),
    ("KDPM2DiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
]


def scheduler_of(name, config, steps=9):
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize(("name", "config"), SCHEDULERS)
def test_a_scheduler_is_its_matrix(name, config):
    """Rows written through few registers must multiply out to the rows that were read off."""
    scheduler = scheduler_of(name, config)
    before = scheduler.timesteps.clone()
    form = scheduler_form(scheduler)
    program = program_from_scheduler(scheduler)
    ours = program.normal_form().rows()[:, :-1]
    assert ours.shape == form.rows.shape == (len(before) + 1, 1 + len(before) + form.noises)
    scale = form.rows.abs().amax(1, keepdim=True)
    assert float(((ours - form.rows) / scale).abs().max()) < 1e-9
    assert torch.equal(scheduler.timesteps, before)
    widest = max(len(op.x) + len(op.m) for step in program.steps for op in step if hasattr(op, "x"))
    assert widest <= 8  # not one long row over everything that happened


def by_hand(model, scheduler, cond, noise):
    """diffusers' loop around our denoiser, noise and states in float32."""
    total = scheduler.config.num_train_timesteps
    shift = 0.0 if model.prediction == "velocity" else 1.0
    x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        with torch.no_grad():
            out = model(seen, (float(t) + shift) / total, cond).value
        x = scheduler.step(out, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize(
    ("name", "config"), [s for s in SCHEDULERS if s[0] in ("UniPCMultistepScheduler", "LMSDiscreteScheduler",
    "HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "PNDMScheduler", "DEISMultistepScheduler")]
)  # fmt: skip
def test_plans_sample_as_the_scheduler_does(name, config, tmp_path):
    flow = name.startswith("Flow")
    model = tiny_denoiser(path="linear", prediction="velocity") if flow else tiny_denoiser(
        path="vp-discrete", prediction="epsilon"
    )  # fmt: skip
    plan = plan_from_scheduler(model, scheduler_of(name, config, steps=6))
    plan.save(tmp_path / "plan.json")
    noise = torch.randn(2, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    cond = torch.tensor([0, 2])
    ours = sample(model, Plan.load(tmp_path / "plan.json"), cond, seeds=[0, 1], x=noise)
    theirs = by_hand(model, scheduler_of(name, config, steps=6), cond, noise)
    assert float((ours - theirs).abs().max() / theirs.std()) < 1e-3
    assert plan.cost(model).flops > 0


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "heun", {"name": "ddim", "eta": 1.0}])
def test_there_and_back(solver):
    """Our solver as a diffusers scheduler, imported again, is our solver."""
    scheduler = ProgramScheduler(solver=solver, timestep_spacing="trailing")
    scheduler.set_timesteps(7)
    ours, again = (p.normal_form().rows() for p in (scheduler.program, program_from_scheduler(scheduler)))
    assert ours.shape == again.shape
    assert float(((ours - again) / ours.abs().amax(1, keepdim=True)).abs().max()) < 1e-9


def test_stochastic_imports_draw_seeded_noise():
    model = tiny_denoiser(path="vp-discrete", prediction="epsilon")
    plan = plan_from_scheduler(model, scheduler_of("DDIMScheduler", PLAIN, steps=4), eta=1.0)
    a, b, c = (sample(model, plan, [0], seeds=[s]) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_what_cannot_be_imported():
    with pytest.raises(PlanError, match="set_timesteps"):
        scheduler_form(diffusers.DDIMScheduler())
    with pytest.raises(PlanError, match="not linear"):
        scheduler_form(scheduler_of("DDIMScheduler", {"clip_sample": True}))
    with pytest.raises(PlanError, match="remembers"):
        program_from_scheduler(scheduler_of("PNDMScheduler", {}, steps=20))
    with pytest.raises(PlanError, match="back in time"):
        program_from_scheduler(scheduler_of("KDPM2AncestralDiscreteScheduler", {}, steps=10))
    with pytest.raises(ConfigError, match="precondition"):
        program_from_scheduler(scheduler_of("EDMEulerScheduler", {}))
    with pytest.raises(ConfigError, match="of its own"):
        program_from_scheduler(scheduler_of("IPNDMScheduler", {}))
    with pytest.raises(PlanError, match="follows"):
        plan_from_scheduler(tiny_denoiser(), scheduler_of("DDIMScheduler", PLAIN))
    model = tiny_denoiser(path="vp-discrete", prediction="epsilon")
    with pytest.raises(PlanError, match="predicts epsilon"):
        plan_from_scheduler(model, scheduler_of("DDIMScheduler", {**PLAIN, "prediction_type": "sample"}))
