"""PliantPipeline: diffusers' way of calling, Pliant's way of sampling."""

import json
from dataclasses import replace

import pytest
import torch

from pliant import Plan, flexify, load, sample
from pliant.errors import PlanError
from support.networks import tiny_denoiser

pytest.importorskip("diffusers")

from pliant.integrations import PliantPipeline
from support.pipelines import tiny_vae

NAMES = ["cat", "dog, hound", "fox"]


def pipeline(vae=False, flexible=False):
    model = tiny_denoiser(in_channels=4 if vae else 3)
    model = replace(model, metadata={**model.metadata, "class_names": NAMES})
    if flexible:
        model = flexify(model, [4], rank=2)
    pipe = PliantPipeline(model, tiny_vae(4) if vae else None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_it_is_the_loop():
    pipe = pipeline()
    out = pipe([0, 2], num_inference_steps=4, guidance_scale=2.0, generator=seeded(), output_type="latent").images
    seeds = [int(v) for v in torch.randint(0, 2**62, (2,), generator=seeded())]
    plan = Plan.uniform(pipe.denoiser, 4, guidance=2.0)
    assert torch.equal(out, sample(pipe.denoiser, plan, [0, 2], seeds))
    assert torch.equal(pipe([0, 2], plan=plan, generator=seeded(), output_type="latent").images, out)


def test_outputs():
    pipe = pipeline()
    image = pipe("Fox", num_inference_steps=2, generator=seeded()).images[0]
    assert image.size == (8, 8) and image.mode == "RGB"
    (array,) = pipe("hound", num_inference_steps=2, generator=seeded(), output_type="np", return_dict=False)
    assert array.shape == (1, 8, 8, 3) and array.min() >= 0.0 and array.max() <= 1.0
    assert pipe(1, 2, num_images_per_prompt=3, output_type="pt").images.shape == (3, 3, 8, 8)


def test_latents_are_decoded():
    pipe = pipeline(vae=True)
    raw = pipe(1, 2, generator=seeded(), output_type="latent").images
    image = pipe(1, 2, generator=seeded(), output_type="pt").images
    with torch.no_grad():
        expected = pipe.vae.decode(raw / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(image, (expected / 2 + 0.5).clamp(0, 1))


def test_each_image_has_its_own_generator():
    pipe = pipeline()
    both = pipe([0, 1], 3, generator=[seeded(1), seeded(2)], output_type="latent").images
    alone = pipe([1], 3, generator=[seeded(2)], output_type="latent").images
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)


def test_budget_and_plan_files(tmp_path):
    pipe = pipeline(flexible=True)
    cheap = pipe(0, 6, budget=0.6, generator=seeded(), output_type="latent").images
    plan = Plan.weak_to_powerful(pipe.denoiser, 6, 0.6)
    plan.save(tmp_path / "plan.json")
    again = pipe(0, plan=tmp_path / "plan.json", generator=seeded(), output_type="latent").images
    assert torch.equal(cheap, again)
    assert not torch.equal(cheap, pipe(0, 6, generator=seeded(), output_type="latent").images)


def test_callbacks_see_change_and_stop():
    pipe, seen = pipeline(), []

    def note(pipe, i, t, tensors):
        seen.append((i, float(t), float(tensors["latents"].std())))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 3 else None

    out = pipe(0, 4, generator=seeded(), output_type="latent", callback_on_step_end=note).images
    assert [i for i, _, _ in seen] == [0, 1, 2, 3] and seen[0][1] == 1000.0 and not bool(out.any())

    def middle(pipe, i, t, tensors):
        return {"latents": tensors["latents"] + 1.0} if i == 1 else {}

    plain, changed = (
        pipe(0, 4, generator=seeded(), output_type="latent", callback_on_step_end=c).images for c in (None, middle)
    )
    assert not torch.allclose(plain, changed)

    def stop(pipe, i, t, tensors):
        pipe._interrupt = True

    seen.clear()
    pipe(0, 4, output_type="latent", callback_on_step_end=stop)
    assert pipe.interrupt


@pytest.mark.parametrize("vae", [False, True])
def test_folder_round_trip(tmp_path, vae):
    pipe = pipeline(vae)
    pipe.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "PliantPipeline"
    again = PliantPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    for image, other in zip(pipe(1, 2, generator=seeded()).images, again(1, 2, generator=seeded()).images, strict=True):
        assert image.tobytes() == other.tobytes()
    assert load(tmp_path / "model" / "denoiser").fingerprint() == pipe.denoiser.fingerprint()
    assert set(again.components) == {"denoiser", "vae"}


def test_dtype():
    pipe = pipeline().to(torch.bfloat16)
    assert pipe.dtype == torch.bfloat16 and pipe.device.type == "cpu"
    assert bool(torch.isfinite(pipe(0, 2, output_type="latent").images).all())


def test_bad_input():
    pipe = pipeline()
    with pytest.raises(PlanError, match="did you mean 'hound'"):
        pipe("houdn")
    with pytest.raises(PlanError, match="output_type"):
        pipe(0, output_type="pill")
    with pytest.raises(PlanError, match="not both"):
        pipe(0, plan=Plan.uniform(pipe.denoiser, 2), budget=0.5)
    with pytest.raises(PlanError, match="generators"):
        pipe([0, 1], generator=[seeded()])
    with pytest.raises(PlanError, match="prompt_embeds"):
        pipe(0, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    with pytest.raises(PlanError, match="class 7"):
        pipe(7)
