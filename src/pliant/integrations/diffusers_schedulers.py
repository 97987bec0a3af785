"""Any Pliant solver inside any diffusers pipeline.

    pipe.scheduler = ProgramScheduler.from_config(pipe.scheduler.config, solver="dpmpp-2m")

The solver is compiled to a program once per `set_timesteps`, cut before each network call; every call is one
timestep of the pipeline, so solvers with several calls per step simply show more timesteps. States are those of the
path itself (variance-preserving or flow), so `scale_model_input` changes nothing, also where diffusers' own Euler
works on scaled states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from pliant.errors import ConfigError, PlanError, suggest
from pliant.integrations.diffusers_grids import PREDICTIONS, flow_times, path_of_config, table_end, table_times
from pliant.paths import NetworkTime, Path, PredictionType
from pliant.solvers import Eval, Output, Program, Solver, compile_program, get_solver
from pliant.solvers.cursor import Cursor, cut, spread_at_first_evaluation
from pliant.solvers.interpreter import combine, sample_coefficients

_SAME = 1e-3  # how far apart timesteps may be that mean the same
_VARIANCES = {"fixed_small": "posterior", "fixed_large": "beta", "learned_range": "learned-range"}


@dataclass
class ProgramSchedulerOutput(BaseOutput):
    """What `step` returns: the state of the next call, and the estimate of clean data where it is determined."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class ProgramScheduler(SchedulerMixin, ConfigMixin):
    """A diffusers scheduler that runs a Pliant solver.

    solver: a name ("dpmpp-2m") or config ({"name": "ddim", "eta": 1.0}). timestep_rule: "ddim" or "dpm", which of
    diffusers' two ways of spacing table timesteps (default: "ddim" for ddim and ddpm, "dpm" for all others).
    timestep_spacing: "leading", "linspace" or "trailing" (default: that of the rule's diffusers class). All other
    options mean what they mean in diffusers. clip_sample and thresholding act on the x0 estimate of every call, and
    what follows sees nothing else (DPM-Solver's way, and DDIM's with use_clipped_model_output=True).
    """

    _compatibles = [*(e.name for e in KarrasDiffusionSchedulers), "FlowMatchEulerDiscreteScheduler"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        solver: str | dict[str, Any] = "dpmpp-2m",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        variance_type: str | None = None,
        timestep_rule: str | None = None,
        timestep_spacing: str | None = None,
        steps_offset: int = 0,
        set_alpha_to_one: bool = True,
        final_sigmas_type: str = "zero",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
        time_shift_type: str = "exponential",
        invert_sigmas: bool = False,
        stochastic_sampling: bool = False,
    ) -> None:
        if prediction_type not in PREDICTIONS:
            raise ConfigError(f"unknown prediction_type {prediction_type!r}: {suggest(prediction_type, PREDICTIONS)}")
        if invert_sigmas:
            raise ConfigError("invert_sigmas (Mochi's reversed flow) is not supported by ProgramScheduler")
        if stochastic_sampling:
            raise ConfigError("stochastic_sampling is a choice of solver here: name a stochastic solver instead")
        self._solver = _chosen_solver(solver, variance_type)
        named = solver if isinstance(solver, str) else solver.get("name")
        self._rule = timestep_rule or ("ddim" if named in ("ddim", "ddpm") else "dpm")
        self._clips = clip_sample or thresholding
        self._variance = variance_type in ("learned", "learned_range")
        self._flow = prediction_type == "flow_prediction"
        self.path: Path = path_of_config(self.config)
        self.network_time = NetworkTime(float(num_train_timesteps), offset=0.0 if self._flow else -1.0)
        if not self._flow:
            table = self.path.alpha_sigma(torch.arange(1, num_train_timesteps + 1) / num_train_timesteps).alpha ** 2
            self.alphas_cumprod = table.float()
        self.num_inference_steps: int | None = None
        self._begin_index: int | None = None
        self._device: str | torch.device | None = None
        self._step_index: int | None = None
        self._cursor: Cursor | None = None
        self._times: list[float] = []
        self._first = 0.0
        whole = torch.arange(num_train_timesteps, 0, -1) / num_train_timesteps
        self.timesteps = self._encoded(whole.tolist())

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler for the model another scheduler's config describes (diffusers or Pliant).

        Keyword arguments override the config. Raises ConfigError for EDM schedulers, whose networks are preconditioned
        inside the scheduler.
        """
        if isinstance(config, Mapping):
            if "sigma_data" in config:
                raise ConfigError(
                    "EDM schedulers precondition the network themselves; ProgramScheduler does not. A network of "
                    "Pliant's own does it with Denoiser(..., preconditioning=Preconditioning(sigma_data=...))"
                )
            # Pipelines raise outdated steps_offset after the fact; diffusers would drop it as "a default".
            defaults = [k for k in config.get("_use_default_values", []) if k != "steps_offset"]
            config = {**config, "_use_default_values": defaults}
            flow = "shift" in config and "beta_schedule" not in config  # FlowMatch*: they do not name a prediction
            if flow and "prediction_type" not in config:
                kwargs.setdefault("prediction_type", "flow_prediction")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    # What pipelines read ----------------------------------------------------------------------------------------------

    @property
    def order(self) -> int:
        """Network calls of a regular step: pipelines multiply step numbers by it."""
        return self._solver.evaluations_per_step

    @property
    def init_noise_sigma(self) -> float:
        """What standard normal noise is multiplied with to become the first state."""
        if not self._times:
            return 1.0
        start = self.program.start
        return spread_at_first_evaluation(self.program, (start.alpha**2 + start.sigma**2) ** 0.5)

    @property
    def step_index(self) -> int | None:
        """How many network outputs this run has taken, counted from the grid's beginning."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this entry of `timesteps` (image-to-image). It must be the first call of a step."""
        self._begin_index = begin_index

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Compile the solver for a grid: `num_inference_steps` as the config says, or explicit timesteps or sigmas.

        sigmas: `sigma/alpha` for tables, times before shifting for flows; a final 0 may be left out. mu: the dynamic
        shift. One of the first three must be given.
        """
        given = [v is not None for v in (timesteps, sigmas)]
        if all(given) or (not any(given) and num_inference_steps is None):
            raise PlanError("give a number of steps, or timesteps, or sigmas")
        end = 0.0
        if timesteps is not None:
            times = self.network_time.decode(torch.as_tensor(timesteps, dtype=torch.float64)).tolist()
        elif self._flow:
            levels = None if sigmas is None else [float(s) for s in sigmas if float(s) > 0.0]
            count = len(levels) if levels is not None else int(num_inference_steps or 0)
            times = flow_times(self.config, count, mu, levels)
        elif sigmas is not None:
            ratios = torch.tensor([float(s) for s in sigmas if float(s) > 0.0], dtype=torch.float64)
            times = self.path.time_of_noise_ratio(ratios).tolist()
        else:
            times = table_times(self.config, self.path, self._rule, int(num_inference_steps or 0))
        if not self._flow:
            end = table_end(self.config, self._rule, times[-1])
        self._device = device
        self._times = [*times, end]
        self.num_inference_steps = len(times)
        self.program: Program = self._compiled(self._times)
        self._cuts = cut(self.program)
        evaluations = self.program.evaluations
        self.timesteps = self._encoded([e.node.t for e in evaluations]).to(device)
        self._first = float(self.timesteps[0])
        levels = [e.node.sigma if self._flow else _ratio(e) for e in evaluations]
        final = self.program.end
        levels.append(final.sigma if self._flow else final.sigma / final.alpha)
        self.sigmas = torch.tensor(levels, dtype=torch.float32)
        self._begin_index = None
        self._reset()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The state as the network wants it: unchanged."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean data at the noise level of `timesteps` (one per sample, or one for all)."""
        t = self.network_time.decode(torch.as_tensor(timesteps).double().cpu()).to(original_samples.device)
        t = t.reshape(-1) if t.numel() == len(original_samples) else t.reshape(-1)[0]
        return self.path.mix(original_samples, noise.to(original_samples), t)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` in the argument order of flow pipelines."""
        return self.add_noise(sample, noise, timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> ProgramSchedulerOutput | tuple[Tensor]:
        """Take the network's output at `sample` and return the state of the next timestep, or the final sample.

        model_output: of `prediction_type`, sample's shape; with twice the channels the second half is the variance
        code. `sample` is what counts: pipelines may change it between calls (inpainting).
        """
        if not self._times:
            raise PlanError("call set_timesteps before step")
        if self._cursor is None:
            self._begin(timestep)
        assert self._cursor is not None and self._step_index is not None
        evaluation = self._cursor.evaluation
        if evaluation is None:
            raise PlanError("all timesteps are done; call set_timesteps before another run")
        variance = None
        if sample.ndim > 1 and model_output.shape[1] == 2 * sample.shape[1]:
            model_output, variance = model_output.chunk(2, dim=1)
        output = Output(self._stored_kind(model_output, sample, evaluation), variance)

        def noise(slot: int) -> Tensor:
            drawn: Tensor = randn_tensor(sample.shape, generator, device=sample.device, dtype=model_output.dtype)
            return drawn

        state = self._cursor.feed(sample, output, noise)
        if state.dtype != model_output.dtype:
            state = state.to(model_output.dtype)
        self._step_index += 1
        if self._cursor.evaluation is None:
            self._cursor = None  # the next call begins a new run on the same grid
        if not return_dict:
            return (state,)
        return ProgramSchedulerOutput(state, self._clean(output.value, sample, evaluation))

    # Inside -----------------------------------------------------------------------------------------------------------

    def _compiled(self, times: Sequence[float]) -> Program:
        stored: PredictionType = "sample" if self._clips else PREDICTIONS[self.config.prediction_type]
        program = compile_program(self.path, times, self._solver, stored, self._variance)
        if program.needs_offset:
            raise ConfigError("this solver needs a path with an offset, which pipelines do not have")
        return program

    def _encoded(self, times: Sequence[float]) -> Tensor:
        """House times as the pipeline's timesteps: integers where they are integers."""
        steps = self.network_time.encode(torch.tensor(list(times), dtype=torch.float64))
        whole = steps.round()
        if not self._flow and bool((steps - whole).abs().max() < 1e-6):
            return whole.long()
        return steps.float()

    def _reset(self) -> None:
        self._cursor = None
        self._step_index = None

    def _begin(self, timestep: float | Tensor) -> None:
        """Start a run at the begin index, or at the first call at this timestep that can begin one."""
        if self._begin_index is not None:
            places = [self._begin_index]
        elif abs(float(timestep) - self._first) < _SAME:
            places = [0]
        else:
            gap = (self.timesteps.double().cpu() - float(timestep)).abs()
            places = torch.nonzero(gap < _SAME).flatten().tolist()
        program, place = next(((p, k) for k in places if (p := self._from(k))), (None, 0))
        if program is None:
            raise PlanError(f"timestep {float(timestep):g} does not begin a step of this schedule")
        self._cursor = Cursor(self._cuts if place == 0 else cut(program), program.variance_outputs)
        self._step_index = place

    def _from(self, place: int) -> Program | None:
        """The program of a run that begins at this entry of `timesteps`, or None if it is inside a step.

        Multistep solvers warm up again where the run begins, so what follows is compiled anew.
        """
        if place == 0:
            return self.program
        evaluations = self.program.evaluations
        if not 0 < place < len(evaluations) or evaluations[place].node.t not in self._times[:-1]:
            return None
        program = self._compiled(self._times[self._times.index(evaluations[place].node.t) :])
        return program if program.num_evaluations == len(evaluations) - place else None

    def _stored_kind(self, value: Tensor, x: Tensor, evaluation: Eval) -> Tensor:
        """The output as the program stores it: as it is, or a clipped x0 estimate."""
        if not self._clips:
            return value
        p, q = sample_coefficients(PREDICTIONS[self.config.prediction_type], evaluation.node)
        clean = x.float() * p + value.float() * q
        if not self.config.thresholding:
            return clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        # Imagen's dynamic thresholding, arXiv 2205.11487, section 2.3.
        size = torch.quantile(clean.flatten(1).abs(), self.config.dynamic_thresholding_ratio, dim=1)
        size = size.clamp(1.0, max(1.0, self.config.sample_max_value)).reshape(-1, *[1] * (clean.ndim - 1))
        return torch.maximum(torch.minimum(clean, size), -size) / size

    def _clean(self, value: Tensor, x: Tensor, evaluation: Eval) -> Tensor | None:
        try:
            p, q = sample_coefficients(self.program.stored, evaluation.node)
        except PlanError:
            return None
        return combine([(p, x), (q, value)], x).to(x.dtype)


def _ratio(evaluation: Eval) -> float:
    node = evaluation.node
    return node.sigma / node.alpha if node.alpha else float("inf")


def _chosen_solver(solver: str | Mapping[str, Any], variance_type: str | None) -> Solver:
    """The solver of a config; `variance_type` decides DDPM's variance unless the solver's own config does."""
    options = {"name": solver} if isinstance(solver, str) else dict(solver)
    if options.get("name") == "ddpm" and "variance" not in options:
        options["variance"] = _VARIANCES.get(variance_type or "fixed_small", "posterior")
    return get_solver(options)
