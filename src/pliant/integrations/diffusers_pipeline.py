"""A diffusers pipeline around a Pliant model: the call people know, with plans and budgets.

    pipe = PliantPipeline.from_pretrained("folder")                    # a Pliant, diffusers or official model
    images = pipe(["golden retriever", 360], num_inference_steps=20, guidance_scale=4.0, budget=0.6).images

Sampling is Pliant's own loop, so seeds, plans and costs are the same as everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.errors import FormatError, PlanError, suggest
from pliant.files import write_json
from pliant.formats import load, save
from pliant.models.autoencoders import decoded, load_autoencoder
from pliant.plans import Plan, Sampler
from pliant.solvers import SolverLike

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
INDEX = "model_index.json"


class PliantPipeline(DiffusionPipeline):
    """Class-conditional generation. denoiser: what `pliant.load` gives. vae: any diffusers autoencoder, or None for
    models of pixels.
    """

    _optional_components = ["vae"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(self, denoiser: Denoiser, vae: Any = None) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, vae=vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._interrupt = False

    # Files and devices ------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        vae: Any = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> PliantPipeline:
        """Read a folder written by `save_pretrained`, or any model `pliant.load` reads (options go there).

        A `vae` folder beside the model is used unless a vae (an autoencoder, or where to find one) is given.
        """
        folder = Path(source)
        model = load(folder / "denoiser" if (folder / "denoiser").is_dir() else source, revision=revision, **options)
        if vae is None and (folder / "vae").is_dir():
            vae = folder / "vae"
        if isinstance(vae, str | Path):
            vae = load_autoencoder(str(vae))
        pipe = cls(model, vae)
        return pipe if dtype is None else pipe.to(dtype)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write `model_index.json`, `denoiser/` (Pliant's format) and `vae/` (diffusers')."""
        folder = Path(save_directory)
        if folder.is_file():
            raise FormatError(f"{folder} is a file; name a folder")
        folder.mkdir(parents=True, exist_ok=True)
        save(self.denoiser, folder / "denoiser")
        kinds: list[str | None] = [None, None]
        if self.vae is not None:
            self.vae.save_pretrained(folder / "vae")
            kinds = ["diffusers", type(self.vae).__name__]
        index = {"_class_name": "PliantPipeline", "_diffusers_version": diffusers.__version__}
        write_json(folder / INDEX, {**index, "denoiser": ["pliant", "Denoiser"], "vae": kinds})

    def to(self, *args: Any, **kwargs: Any) -> PliantPipeline:
        """Move and cast, as modules do."""
        super().to(*args, **kwargs)
        self.denoiser.network.to(*args, **kwargs)
        return self

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the current step."""
        return self._interrupt

    # Generation -------------------------------------------------------------------------------------------------------

    def get_label_ids(self, labels: int | str | Sequence[int | str]) -> list[int]:
        """Class numbers from numbers or names. Raises PlanError with the nearest name."""
        known = [text.lower().split(",") for text in self.denoiser.class_names]
        names = {name.strip(): k for k, synonyms in enumerate(known) for name in synonyms}
        found = []
        for label in [labels] if isinstance(labels, int | str) else labels:
            if isinstance(label, str) and label.strip().lower() not in names:
                raise PlanError(f"unknown class {label!r}: {suggest(label, list(names))}")
            found.append(names[label.strip().lower()] if isinstance(label, str) else int(label))
        return found

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        plan: Plan | str | Path | None = None,
        budget: float | str | None = None,
        solver: SolverLike = "dpmpp-2m",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample.

        class_labels: numbers or names. plan: a `Plan` or its file; it decides steps, guidance and solver itself.
        budget: a FLOPs fraction ("0.6"), latency or FLOPs: weak steps first (needs a flexible model). generator: seeds
        are drawn from it, one per image (a list: one generator per image), so an image depends on its own seed only.
        latents: start states (B, C, H, W) instead of seeded noise. guidance_scale: classifier-free; 1 is none.
        callback_on_step_end(pipe, step, timestep, {"latents": ...}) may return changed latents.
        """
        if output_type not in OUTPUT_TYPES:
            raise PlanError(f"unknown output_type {output_type!r}: {suggest(output_type, OUTPUT_TYPES)}")
        if unknown := [k for k in callback_on_step_end_tensor_inputs if k not in self._callback_tensor_inputs]:
            raise PlanError(f"callbacks can ask for {self._callback_tensor_inputs}, not {unknown[0]!r}")
        labels = [k for k in self.get_label_ids(class_labels) for _ in range(num_images_per_prompt)]
        chosen = self._plan(plan, budget, num_inference_steps, guidance_scale, solver)
        seeds = _seeds(generator, len(labels))
        self._interrupt = False
        x = latents
        times = self.denoiser.encode(torch.tensor(chosen.times[:-1], dtype=torch.float64))
        with self.progress_bar(total=len(chosen.steps)) as bar:
            for result in Sampler(self.denoiser, chosen).steps(labels, seeds, latents):
                x = result.x
                if callback_on_step_end is not None:
                    given = {"latents": x} if callback_on_step_end_tensor_inputs else {}
                    answer = callback_on_step_end(self, result.index, times[result.index], given) or {}
                    changed = answer.get("latents", x)
                    if changed is not x:
                        x.copy_(changed)  # the loop's own register: what follows starts from here
                bar.update()
                if self._interrupt:
                    break
        assert x is not None  # a plan has at least one step
        images = x if output_type == "latent" else self.image_processor.postprocess(self.decode(x), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images in about [-1, 1]; pixels stay as they are."""
        if self.vae is None:
            return latents.float()
        return decoded(self.vae, latents, self.denoiser.metadata.get("latents"))

    def _plan(
        self,
        plan: Plan | str | Path | None,
        budget: float | str | None,
        steps: int,
        guidance: float,
        solver: SolverLike,
    ) -> Plan:
        if plan is not None:
            if budget is not None:
                raise PlanError("give a plan or a budget, not both: a plan states its own cost")
            return plan if isinstance(plan, Plan) else Plan.load(plan)
        if budget is not None:
            return Plan.weak_to_powerful(self.denoiser, steps, budget, solver=solver, guidance=guidance)
        return Plan.uniform(self.denoiser, steps, solver, guidance=guidance)


def _seeds(generator: torch.Generator | list[torch.Generator] | None, count: int) -> list[int]:
    """One seed per image."""
    if isinstance(generator, list):
        if len(generator) != count:
            raise PlanError(f"{count} images need {count} generators, got {len(generator)}")
        return [_seeds(g, 1)[0] for g in generator]
    device = "cpu" if generator is None else generator.device
    return [int(v) for v in torch.randint(0, 2**62, (count,), generator=generator, device=device)]
