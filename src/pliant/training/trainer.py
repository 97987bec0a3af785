"""The training loop, on accelerate: one step is a pure function of the state and the step number."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import accelerate
import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from pliant.allocator import keep_freed_memory
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, PliantError
from pliant.training import setup, setup_data
from pliant.training.checkpoint import (
    checkpoint_path,
    has_checkpoints,
    latest_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from pliant.training.compiling import compile_blocks
from pliant.training.config import TrainConfig
from pliant.training.data import EqualBlocks, Feed, SizedSet, TokenFeed, TrainingSet
from pliant.training.draws import Draws
from pliant.training.export import averaged_weights, export, finished
from pliant.training.grids import grid_sampler
from pliant.training.metrics import Reporter, Window
from pliant.training.models import companions, prepared
from pliant.training.objectives import Batch, Objective, SizedBatch
from pliant.training.prefetch import Prefetch, moved, pinned
from pliant.training.refinement import NormRecord, Refined, read_norms, refine_schedule
from pliant.training.schedule import learning_rate
from pliant.training.sharded import whole
from pliant.training.sharding import check_sharded, shard, sharding_asked, unsharded_twin
from pliant.training.state import Trainable
from pliant.training.step import StepModule, mean_flops, micro_batch

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
    """The trained denoiser with the averaged weights, in eval mode."""


def train(
    config: TrainConfig,
    *,
    denoiser: Denoiser | None = None,
    data: TrainingSet | SizedSet | None = None,
    sampler: Sampler | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Run (or resume) a training run. `denoiser` and `data` replace what the config names, if given.

    `sampler(denoiser, step)` is called every `sampling.every` steps; by default it writes a grid of images.

    Under `accelerate launch` every process calls this. Raises PliantError for unusable input, when the loss is
    not finite, and when the final result cannot be written.
    """
    denoiser = denoiser or setup.build_denoiser(config)
    objective = setup.build_objective(config, denoiser)
    if config.tokens is not None:
        sized = setup_data.build_sized_data(config, denoiser) if data is None else cast(SizedSet, data)
        setup_data.check_sized_data(sized, denoiser)
        data = sized
    else:
        of = setup_data.data_model(objective, denoiser)
        fixed = setup_data.build_data(config, of) if data is None else cast(TrainingSet, data)
        setup_data.check_data(fixed, of)
        data = fixed
    denoiser = setup_data.with_data_facts(denoiser, data)
    if sampler is None and config.sampling.every:
        sampler = grid_sampler(config.sampling, Path(config.output) / "samples")
    return Trainer(config, denoiser, objective, data, sampler, quiet).run()


class Trainer:
    """One run in one process (of possibly many)."""

    def __init__(
        self,
        config: TrainConfig,
        denoiser: Denoiser,
        objective: Objective,
        data: TrainingSet | SizedSet,
        sampler: Sampler | None,
        quiet: bool,
    ) -> None:
        self.config, self.sampler, self.folder = config, sampler, Path(config.output)
        # A patch size that a batch does not use leaves parameters without gradient; DDP must expect that.
        ddp = DistributedDataParallelKwargs(find_unused_parameters=len(denoiser.patch_sizes) > 1)
        self.accelerator = accelerate.Accelerator(mixed_precision="no", kwargs_handlers=[ddp])
        self.device = self.accelerator.device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.main = self.accelerator.is_main_process
        self.quiet = quiet or not self.main
        self.blocks = self.accelerator.num_processes * config.accumulate
        """Forward passes of an optimizer step, over all processes."""
        self.denoiser = denoiser
        sharding = sharding_asked(self.accelerator)
        self._twin: nn.Module | None = None
        """Of a sharded network: one that samples and is exported, without weights while training."""
        if sharding is None:
            self.denoiser = denoiser.to(self.device)
        else:
            check_sharded(objective)
            if config.compile:
                raise ConfigError("compiled blocks and FSDP do not go together yet; leave out one of them")
            self._twin = unsharded_twin(denoiser)
        if config.checkpointing:
            if not hasattr(denoiser.core, "checkpointing"):
                raise ConfigError(f"checkpointing is for flexible networks and FiT; this is a {denoiser.core.family}")
            vars(denoiser.core)["checkpointing"] = True
        beside = [module.to(self.device) for module in companions(objective)]
        step_module = StepModule(self.denoiser, beside, config.precision == "bf16")
        if sharding is not None:
            shard(step_module, self.denoiser.network, sharding, self.device)
        self.state = Trainable(self.denoiser.network.train(), config, beside)
        step_module.objective = objective = prepared(objective, self.denoiser, self.state.ema)
        if config.compile:
            compile_blocks(self.denoiser.network)
        self.step_module = step_module if sharding is not None else self.accelerator.prepare_model(step_module)
        self.feed: EqualBlocks | TokenFeed
        if config.tokens is not None:
            sized = cast(SizedSet, data)
            self.feed = TokenFeed(sized, denoiser.config.patch_size, config.tokens, config.seed, config.data.flip)
            self.flops_per_image = mean_flops(objective, self.denoiser, sized)
        else:
            feed = Feed(cast(TrainingSet, data), config.seed, config.data.flip, objective.needs_partners)
            self.feed = EqualBlocks(feed, micro_batch(config, self.accelerator.num_processes))
            self.flops_per_image = objective.flops(self.denoiser)
        self._images = 0
        """Seen by this process since the last report."""
        self._refined: Refined | None = None
        if config.optimizer.refine_from is not None:
            self._refined = Refined(refine_schedule(read_norms(config.optimizer.refine_from)))
        # Steps and norms since the last checkpoint.
        self._norms = NormRecord(self.folder) if config.optimizer.record_norms else None
        self._previous_norm: Tensor | None = None
        self._last_checkpoint: Path | None = None
        self._last_loss = math.nan

    # The loop -----------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """All steps that are left, then the export."""
        config, count = self.config, self.config.accumulate
        start = self._start()
        window = Window()
        with contextlib.ExitStack() as stack:
            report = None
            if self.main:
                report = stack.enter_context(Reporter(self.folder, start, config.steps, self.quiet))
                if start:
                    report.say(f"resumed from {self._last_checkpoint}")
                if self._twin is not None:
                    report.say(f"sharded over {self.accelerator.num_processes} processes")
            ahead = Prefetch(self._fetch, start * count, config.steps * count, self.device.type != "cpu")
            batches = stack.enter_context(contextlib.closing(ahead))
            for step in range(start, config.steps):
                window.add(self._step(step, batches))
                done = step + 1
                if report is not None:
                    report.advance(done)
                if done % config.log_every == 0 or done == config.steps:
                    self._report(done, window, report)
                if done % config.checkpoint.every == 0 or done == config.steps:
                    self._checkpoint(done)
                if config.sampling.every and done % config.sampling.every == 0:
                    self._sample(done)
        return self._finish()

    def _step(self, step: int, batches: Prefetch) -> dict[str, Tensor]:
        """One optimizer step. Returns scalars on the device, averaged over this process's micro-batches."""
        config = self.config
        logs: dict[str, Tensor] = {}
        for micro in range(config.accumulate):
            batch = moved(batches.get(step * config.accumulate + micro), self.device)
            rows = self.feed.rows(step, self._block(micro), self.blocks)
            draws = Draws(config.seed, step, rows, self.feed.total(self.blocks), self.device)
            self._images += len(batch)
            last = micro == config.accumulate - 1
            # Sharded gradients are reduced at once: kept whole until the last micro-batch they would fill the memory.
            at_once = last or self._twin is not None
            with contextlib.nullcontext() if at_once else self.accelerator.no_sync(self.step_module):
                loss, extra = self.step_module(batch, draws)
                self.accelerator.backward(loss / config.accumulate)
            for name, value in {"loss": loss.detach(), **extra}.items():
                logs[name] = logs.get(name, torch.zeros((), device=self.device)) + value / config.accumulate
        if self._norms is not None:
            gradients = [whole(p.grad) for p in self.state.parameters.values() if p.grad is not None]
            self._norms.add(step, gradients)
        clip = config.optimizer.clip or math.inf
        norm = whole(torch.nn.utils.clip_grad_norm_(self.state.parameters.values(), clip).detach())
        self._refuse_divergence(step, logs["loss"], norm)
        self.state.update(step, self._rate(step))
        return {**logs, "grad_norm": norm}

    def _rate(self, step: int) -> float:
        o = self.config.optimizer
        return learning_rate(step, o.lr, o.warmup, o.decay, self.config.steps, self._refined)

    def _block(self, micro: int) -> int:
        """Which of a step's blocks is this process's micro-batch."""
        return micro * self.accelerator.num_processes + self.accelerator.process_index

    def _fetch(self, k: int) -> Batch | SizedBatch:
        """Micro-batch number k of this process since the start of the run."""
        step, micro = divmod(k, self.config.accumulate)
        batch = self.feed.batch(step, self._block(micro), self.blocks)
        return pinned(batch) if self.device.type == "cuda" else batch

    def _refuse_divergence(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Stop on a loss or gradient that is not finite, before it reaches the weights.

        The norm is the same on all processes (gradients are averaged already), so all stop together. On
        accelerators the norm of the step before is read: waiting for the current one would drain the queue every
        step. Checkpoints look at the weights themselves.
        """
        if self.device.type == "cpu":
            alone = self.accelerator.num_processes == 1
            bad = not bool(torch.isfinite(norm)) or (alone and not bool(torch.isfinite(loss)))
        else:
            bad = self._previous_norm is not None and not bool(torch.isfinite(self._previous_norm))
            self._previous_norm = norm
        if bad:
            self._stop_diverged(step, float(loss), float(norm))

    def _stop_diverged(self, step: int, loss: float, norm: float) -> None:
        raise PliantError(
            f"training stopped at step {step}: loss {loss}, gradient norm {norm} (not finite); "
            f"{self._good_checkpoint()}. Lower optimizer.lr (now {self._rate(step):.1e}) or optimizer.clip, "
            f"then resume."
        )

    # Reporting ----------------------------------------------------------------------------------------------

    def _report(self, done: int, window: Window, report: Reporter | None) -> None:
        seconds, means = window.seconds, window.means()
        window.reset()
        names = sorted(means)
        if self.accelerator.num_processes > 1:
            values = torch.tensor([means[name] for name in names], device=self.device)
            means = dict(zip(names, self.accelerator.reduce(values, "mean").tolist(), strict=True))
        self._last_loss = means["loss"]
        if report is None:
            return
        images = self._images * self.accelerator.num_processes / max(seconds, 1e-9)
        self._images = 0
        extra = {name: value for name, value in means.items() if name not in ("loss", "grad_norm")}
        report.metrics(
            done,
            {
                "loss": means["loss"],
                **extra,
                "lr": self._rate(done - 1),
                "grad_norm": means["grad_norm"],
                "images_per_second": images,
                "flops_per_second": images * self.flops_per_image,
            },
        )

    def _sample(self, done: int) -> None:
        with averaged_weights(self.denoiser, self.state.ema, self._twin, self.main) as denoiser, torch.no_grad():
            if self.main and self.sampler is not None:
                try:
                    self.sampler(denoiser, done)
                except (OSError, PliantError) as error:  # a missing picture is no reason to stop
                    logger.warning("no samples at step %d: %s; training goes on", done, error)
        self.accelerator.wait_for_everyone()

    # State --------------------------------------------------------------------------------------------------

    def _start(self) -> int:
        """Prepare the folder and load the newest checkpoint if asked to. Returns the finished steps."""
        if self.main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"cannot create the output folder {self.folder}: {error.strerror}") from None
            remove_unfinished(self.folder)
        self.accelerator.wait_for_everyone()
        if self.config.resume is None:
            if has_checkpoints(self.folder):
                raise ConfigError(
                    f"{self.folder} already holds checkpoints: continue with resume=latest, or choose another output"
                )
            return 0
        found = latest_checkpoint(self.folder)
        if found is None:
            return 0
        path, state = found
        if state.step > self.config.steps:
            raise ConfigError(f"{path} is beyond steps={self.config.steps}; ask for more steps")
        self.state.restore(path, state)
        self._last_checkpoint = path
        return state.step

    def _checkpoint(self, done: int) -> None:
        """Save. A full disk leaves the run going and the earlier checkpoint valid, except at the very end."""
        if not self.state.is_finite():
            self._stop_diverged(done - 1, self._last_loss, math.nan)
        if not self.main and self._twin is None:
            return
        state = self.state.capture(done, keep=self.main)
        if not self.main:
            return
        if self._norms is not None:
            self._norms.write()
        try:
            self._last_checkpoint = save_checkpoint(self.folder, state, self.config.checkpoint.keep)
        except OSError as error:
            name = checkpoint_path(self.folder, done).name
            message = f"could not write {name} ({error.strerror or error}); {self._good_checkpoint()}"
            if done == self.config.steps:
                raise PliantError(f"{message}. Free some space and run again with resume=latest.") from None
            logger.warning("%s; training goes on", message)

    def _good_checkpoint(self) -> str:
        good = self._last_checkpoint
        return f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"

    def _finish(self) -> TrainResult:
        """Put the averages into the network and export it."""
        self.accelerator.wait_for_everyone()
        config = self.config
        result = finished(self.denoiser, self.state.ema, self._twin, config)
        target = self.folder / "model"
        if self.main:
            try:
                export(result, self.folder)
            except OSError as error:
                reason = error.strerror or error
                raise PliantError(f"could not write {target}: {reason}; {self._good_checkpoint()}") from None
        self.accelerator.wait_for_everyone()
        checkpoint = checkpoint_path(self.folder, config.steps)
        return TrainResult(config.steps, self._last_loss, target, checkpoint, result)
