"""Real diffusers pipelines with tiny random weights: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch


def tiny_vae(channels: int = 4, **options: Any) -> Any:
    """An AutoencoderKL without down-sampling."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"],
        block_out_channels=[8], norm_num_groups=2, latent_channels=channels, layers_per_block=1, **options,
    ).eval()  # fmt: skip


def _shaken(module: Any, seed: int = 0, std: float = 0.2) -> Any:
    """Fresh weights everywhere: zero-initialised layers would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * std / p[0].numel() ** 0.5 * 3)
    return module.eval()


def dit_pipeline(scheduler: Any, learned_sigma: bool = True) -> Any:
    """DiTPipeline, 8x8 latents with 4 channels, 5 classes."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8 if learned_sigma else 4,
        num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
        norm_elementwise_affine=False, activation_fn="gelu-approximate", attention_bias=True,
    )  # fmt: skip
    pipe = DiTPipeline(_shaken(network), tiny_vae(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd_pipeline(scheduler: Any, kind: Any = None) -> Any:
    """StableDiffusionPipeline (SD 1.x): a small U-Net and CLIP text encoder; call it with `prompt_embeds`."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=2,
    ).eval()  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=50)
    )
    build = kind or StableDiffusionPipeline
    pipe = build(
        vae=tiny_vae(), text_encoder=text.eval(), tokenizer=None, unet=network, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_pipeline(scheduler: Any) -> Any:
    """FluxPipeline with a small flow transformer; call it with `prompt_embeds` and `pooled_prompt_embeds`."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = FluxPipeline(
        scheduler=scheduler, vae=tiny_vae(4), text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=_shaken(network),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3_pipeline(scheduler: Any) -> Any:
    """StableDiffusion3Pipeline with a small MMDiT; call it with `prompt_embeds` and `pooled_prompt_embeds`."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=_shaken(network), scheduler=scheduler, vae=tiny_vae(4, shift_factor=0.0), text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, steps: int, seed: int = 1, **options: Any) -> torch.Tensor:
    """The latents (or pixels, for DiT) a pipeline makes from fixed noise and fixed text."""
    kind = type(pipe).__name__
    generator = torch.Generator().manual_seed(seed)
    draw = torch.Generator().manual_seed(3)
    if kind == "DiTPipeline":
        out = pipe([1, 4], guidance_scale=3.0, num_inference_steps=steps, generator=generator, output_type="np")
        return torch.from_numpy(out.images)
    words = torch.randn(1, 7, 16, generator=draw)
    options = {"generator": generator, "num_inference_steps": steps, "output_type": "latent", **options}
    if kind.startswith("StableDiffusion3"):
        pooled = torch.randn(1, 16, generator=draw)
        options |= {"pooled_prompt_embeds": pooled, "negative_prompt_embeds": -words}
        options |= {"negative_pooled_prompt_embeds": -pooled, "height": 8, "width": 8}
    elif kind.startswith("Flux"):
        options |= {"pooled_prompt_embeds": torch.randn(1, 16, generator=draw), "height": 8, "width": 8}
    else:
        options |= {"negative_prompt_embeds": -words}
    return pipe(prompt_embeds=words, **options).images


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the spread of the reference."""
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().std())
