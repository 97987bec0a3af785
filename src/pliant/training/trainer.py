"""The training loop, on accelerate: one optimizer step is a pure function of the state and the step number."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import accelerate
import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, FormatError, PliantError
from pliant.training import setup
from pliant.training.checkpoint import (
    TrainingState,
    changed_settings,
    checkpoint_path,
    frozen_hash,
    has_checkpoints,
    latest_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from pliant.training.config import TrainConfig
from pliant.training.data import Feed, TrainingSet
from pliant.training.draws import Draws
from pliant.training.ema import EMA
from pliant.training.metrics import Reporter, Window
from pliant.training.objectives import Batch, Objective
from pliant.training.prefetch import Prefetch, moved, pinned
from pliant.training.schedule import learning_rate

logger = logging.getLogger("pliant.training")

Sampler: TypeAlias = Callable[[Denoiser, int], None]
"""`sampler(denoiser, step)`, called on the main process with the averaged weights in place."""


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind."""

    step: int
    """Finished optimizer steps."""
    loss: float
    """Mean over the last reporting interval (nan if nothing was left to do)."""
    model_folder: Path
    """The averaged weights as a native model folder."""
    checkpoint: Path
    denoiser: Denoiser
    """The trained denoiser with the averaged weights."""


class _Step(nn.Module):
    """The forward half of a step as one module, so that DDP sees every parameter used by any objective."""

    def __init__(self, denoiser: Denoiser, objective: Objective, bf16: bool) -> None:
        super().__init__()
        self.network = denoiser.network
        self._denoiser, self._objective, self._bf16 = denoiser, objective, bf16

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(batch.images.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            result = self._objective(self._denoiser, batch, draws)
        return result.loss, dict(result.logs)


def train(
    config: TrainConfig,
    *,
    denoiser: Denoiser | None = None,
    data: TrainingSet | None = None,
    sampler: Sampler | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Run (or resume) a training run. `denoiser` and `data` replace what the config names, if given.

    Under `accelerate launch` every process calls this. Raises PliantError for unusable input, when the loss is not
    finite, and when the final result cannot be written.
    """
    denoiser = denoiser or setup.build_denoiser(config)
    objective = setup.build_objective(config, denoiser)
    data = data if data is not None else setup.build_data(config.data, denoiser)
    setup.check_labels(data, denoiser)
    denoiser = setup.with_class_names(denoiser, data)
    return Trainer(config, denoiser, objective, data, sampler, quiet).run()


class Trainer:
    """State of a run: parameters, averages, optimizer. Everything else is computed from the step number."""

    def __init__(
        self,
        config: TrainConfig,
        denoiser: Denoiser,
        objective: Objective,
        data: TrainingSet,
        sampler: Sampler | None,
        quiet: bool,
    ) -> None:
        self.config, self.objective, self.sampler = config, objective, sampler
        # A patch size that a batch does not use leaves parameters without gradient; DDP must expect that.
        ddp = DistributedDataParallelKwargs(find_unused_parameters=len(denoiser.patch_sizes) > 1)
        self.accelerator = accelerate.Accelerator(mixed_precision="no", kwargs_handlers=[ddp])
        self.main = self.accelerator.is_main_process
        self.quiet = quiet or not self.main
        self.micro_batch = _micro_batch(config, self.accelerator.num_processes)
        self.folder = Path(config.output)

        self.denoiser = denoiser.to(self.accelerator.device)
        network = self.denoiser.network.train()
        self.trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise ConfigError("nothing to train: every parameter of the model is frozen")
        self.frozen_hash = frozen_hash(network)
        self.ema = EMA(self.trainable, config.ema.decay, config.ema.warmup)
        self.optimizer = torch.optim.AdamW(
            self.trainable.values(),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            fused=self.accelerator.device.type in ("cpu", "cuda") or None,
        )
        self.step_module = self.accelerator.prepare_model(
            _Step(self.denoiser, objective, config.precision == "bf16")
        )
        self.feed = Feed(data, config.seed, config.data.flip, objective.needs_partners)
        self.flops_per_image = objective.flops(self.denoiser)
        self._previous_norm: Tensor | None = None
        self._last_checkpoint: Path | None = None
        self._last_loss = math.nan

    # The loop -----------------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        start, steps, every = self._resume(), self.config.steps, self.config
        if self.main:
            self._prepare_folder()
        self.accelerator.wait_for_everyone()
        window = Window()
        count = self.config.accumulate
        threaded = self.accelerator.device.type != "cpu"
        with contextlib.ExitStack() as stack:
            report = (
                stack.enter_context(Reporter(self.folder, start, steps, self.quiet)) if self.main else None
            )
            batches = stack.enter_context(
                contextlib.closing(Prefetch(self._fetch, start * count, steps * count, threaded))
            )
            if report is not None and start:
                report.say(f"resumed from {self._last_checkpoint}")
            for step in range(start, steps):
                window.add(self._step(step, batches))
                done = step + 1
                if report is not None:
                    report.advance(done)
                if done % every.log_every == 0 or done == steps:
                    self._report(done, window, report)
                if done % every.checkpoint.every == 0 or done == steps:
                    self._checkpoint(done)
                if every.sampling.every and done % every.sampling.every == 0:
                    self._sample(done)
        return self._finish()

    def _step(self, step: int, batches: Prefetch) -> dict[str, Tensor]:
        """One optimizer step. Returns scalars on the device, averaged over this process's micro-batches."""
        config, device = self.config, self.accelerator.device
        logs: dict[str, Tensor] = {}
        for micro in range(config.accumulate):
            batch = moved(batches.get(step * config.accumulate + micro), device)
            draws = Draws(config.seed, step, self._rows(micro), config.batch_size, device)
            last = micro == config.accumulate - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.step_module):
                loss, extra = self.step_module(batch, draws)
                self.accelerator.backward(loss / config.accumulate)
            for name, value in {"loss": loss.detach(), **extra}.items():
                logs[name] = logs.get(name, torch.zeros((), device=device)) + value / config.accumulate
        norm = torch.nn.utils.clip_grad_norm_(self.trainable.values(), config.optimizer.clip or math.inf)
        self._refuse_divergence(step, logs["loss"], norm)
        rate = self._rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(step)
        return {**logs, "grad_norm": norm.detach()}

    def _rate(self, step: int) -> float:
        o = self.config.optimizer
        return learning_rate(step, o.lr, o.warmup, o.decay, self.config.steps)

    def _rows(self, micro: int) -> range:
        """This process's places in the global batch for one micro-batch."""
        block = micro * self.accelerator.num_processes + self.accelerator.process_index
        return range(block * self.micro_batch, (block + 1) * self.micro_batch)

    def _fetch(self, k: int) -> Batch:
        """Micro-batch number k of this process since the start of the run."""
        step, micro = divmod(k, self.config.accumulate)
        batch = self.feed.batch(step, self._rows(micro), self.config.batch_size)
        return pinned(batch) if self.accelerator.device.type == "cuda" else batch

    def _refuse_divergence(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Stop on a loss or gradient that is not finite, before it reaches the weights.

        The norm is the same on all processes (gradients are already averaged), so all stop together. On accelerators
        the norm of the step before is read instead: waiting for the current one would drain the queue every step.
        Checkpoints look at the weights themselves.
        """
        if self.accelerator.device.type == "cpu":
            alone = self.accelerator.num_processes == 1
            bad = not bool(torch.isfinite(norm)) or (alone and not bool(torch.isfinite(loss)))
        else:
            bad = self._previous_norm is not None and not bool(torch.isfinite(self._previous_norm))
            self._previous_norm = norm.detach()
        if bad:
            self._stop_diverged(step, float(loss), float(norm))

    def _stop_diverged(self, step: int, loss: float, norm: float) -> None:
        good = (
            f"the last good checkpoint is {self._last_checkpoint}"
            if self._last_checkpoint
            else "there is no checkpoint yet"
        )
        raise PliantError(
            f"training stopped at step {step}: loss {loss}, gradient norm {norm} (not finite); {good}. "
            f"Lower optimizer.lr (now {self._rate(step):.1e}) or optimizer.clip, then resume."
        )

    # Reporting ----------------------------------------------------------------------------------------------------

    def _report(self, done: int, window: Window, report: Reporter | None) -> None:
        seconds, means = window.seconds, window.means()
        names = sorted(means)
        if self.accelerator.num_processes > 1:
            values = torch.tensor([means[name] for name in names], device=self.accelerator.device)
            means = dict(zip(names, self.accelerator.reduce(values, "mean").tolist(), strict=True))
        self._last_loss = means["loss"]
        images = window.steps * self.config.batch_size / max(seconds, 1e-9)
        if report is not None:
            extra = {name: value for name, value in means.items() if name not in ("loss", "grad_norm")}
            values_ = {
                "loss": means["loss"],
                **extra,
                "lr": self._rate(done - 1),
                "grad_norm": means["grad_norm"],
            }
            values_ |= {"images_per_second": images, "flops_per_second": images * self.flops_per_image}
            report.metrics(done, values_)
        window.reset()

    def _sample(self, done: int) -> None:
        if self.main and self.sampler is not None:
            network = self.denoiser.network
            with self.ema.applied(), torch.no_grad():
                network.eval()
                self.sampler(self.denoiser, done)
                network.train()
        self.accelerator.wait_for_everyone()

    # State --------------------------------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot create the output folder {self.folder}: {error.strerror}") from None

    def _resume(self) -> int:
        """Load the newest checkpoint if asked to; returns the number of finished steps."""
        if self.config.resume is None:
            if has_checkpoints(self.folder):
                raise ConfigError(
                    f"{self.folder} already holds checkpoints: continue with resume=latest, or choose another output"
                )
            return 0
        if self.main:
            remove_unfinished(self.folder)
        found = latest_checkpoint(self.folder)
        if found is None:
            return 0
        path, state = found
        if state.step > self.config.steps:
            raise ConfigError(
                f"{path} is beyond steps={self.config.steps}; ask for more steps or choose another output"
            )
        self._load(path, state)
        self._last_checkpoint = path
        return state.step

    def _load(self, path: Path, state: TrainingState) -> None:
        if state.info.get("frozen") != self.frozen_hash:
            raise FormatError(
                f"{path} belongs to another base model: the frozen weights differ from the ones loaded now"
            )
        if self.main:
            for name in changed_settings(dict(state.info.get("config", {})), self.config.to_dict()):
                logger.warning(
                    "resuming with another %s than before: the result is not that of one uninterrupted run",
                    name,
                )
        own = self._model_tensors()
        if own.keys() != state.model.keys() or any(own[k].shape != v.shape for k, v in state.model.items()):
            raise FormatError(f"{path} is for another model: its tensors differ in name or shape")
        with torch.no_grad():
            for name, tensor in state.model.items():
                own[name].copy_(tensor)
        self.ema.load_state_dict(state.ema)
        self.optimizer.load_state_dict(dict(state.optimizer))

    def _model_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores of the model: trainable parameters and persistent buffers."""
        network = self.denoiser.network
        frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
        return {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}

    def _checkpoint(self, done: int) -> None:
        """Save; a full disk leaves the run going and the earlier checkpoint valid, except at the very end."""
        if not all(bool(torch.isfinite(p).all()) for p in self.trainable.values()):
            self._stop_diverged(done - 1, self._last_loss, math.nan)
        if not self.main:
            return
        info = {"config": self.config.to_dict(), "frozen": self.frozen_hash, "torch": torch.__version__}
        state = TrainingState(
            done, self._model_tensors(), self.ema.state_dict(), self.optimizer.state_dict(), info
        )
        try:
            self._last_checkpoint = save_checkpoint(self.folder, state, self.config.checkpoint.keep)
        except OSError as error:
            kept = (
                f"the last good one is {self._last_checkpoint}"
                if self._last_checkpoint
                else "there is none yet"
            )
            message = f"could not write {checkpoint_path(self.folder, done).name} ({error.strerror or error}); {kept}"
            if done == self.config.steps:
                raise PliantError(f"{message}. Free some space and run again with resume=latest.") from None
            logger.warning("%s; training goes on", message)

    def _finish(self) -> TrainResult:
        """Put the averages into the network and export it."""
        from pliant.adapters import FlexiDiT
        from pliant.formats import native

        self.accelerator.wait_for_everyone()
        self.ema.copy_to_parameters()
        network = self.denoiser.network.eval()
        metadata = {
            **self.denoiser.metadata,
            "training": {"config": self.config.to_dict(), "steps": self.config.steps},
        }
        result = replace(self.denoiser, metadata=metadata)
        target = self.folder / "model"
        if self.main:
            try:
                native.save(result, target)
                if isinstance(network, FlexiDiT) and network.spec.recipe == "lora":
                    native.save_adapter(result, self.folder / "adapter")
            except OSError as error:
                raise PliantError(
                    f"could not write {target}: {error.strerror or error}; the checkpoint is kept"
                ) from None
        self.accelerator.wait_for_everyone()
        checkpoint = checkpoint_path(self.folder, self.config.steps)
        return TrainResult(self.config.steps, self._last_loss, target, checkpoint, result)


def _micro_batch(config: TrainConfig, processes: int) -> int:
    """Samples per forward pass. Raises ConfigError if the global batch does not divide."""
    parts = processes * config.accumulate
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size {config.batch_size} does not divide over {processes} processes x {config.accumulate} "
            f"micro-batches; use a multiple of {parts}"
        )
    return config.batch_size // parts
