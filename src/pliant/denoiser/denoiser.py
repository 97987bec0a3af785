"""A denoiser: a network plus the path it was trained on, its prediction type and its conditioning.

Everything above this line of the house speaks house time and asks for predictions; everything below is a plain
network with its own conventions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from pliant.adapters.alignment import Alignment, coarse
from pliant.adapters.exit_dit import ExitDiT
from pliant.adapters.flexible_dit import FlexiDiT
from pliant.adapters.token_router import TokenRoutedDiT
from pliant.adapters.width import DynamicDiT
from pliant.compute import MATMUL, Compute, Convention, TransformerShape
from pliant.denoiser import aligning, call_cost
from pliant.denoiser import identity as identities
from pliant.denoiser.prediction import Prediction, Trained
from pliant.errors import ConfigError, ShapeError
from pliant.models.dit import DiT, DiTConfig
from pliant.models.network import Backbone, NetworkConfig, Size, Taps, named
from pliant.models.patches import patch_pair
from pliant.paths import Match, NetworkTime, Path, Preconditioning, PredictionType, like, match, prediction_type

if TYPE_CHECKING:
    from pliant.adapters.low_band_denoiser import LowBandDenoiser

Network: TypeAlias = Backbone | ExitDiT | DynamicDiT | TokenRoutedDiT


@dataclass(frozen=True)
class Denoiser:
    """A network with its meaning. Frozen: `dataclasses.replace` makes variants that share the network."""

    network: Network
    path: Path
    """The path that states and times are on."""
    prediction: PredictionType
    """What calls answer with."""
    network_time: NetworkTime = field(default_factory=NetworkTime)
    metadata: dict[str, Any] = field(default_factory=dict)
    """Facts for people and files: "name", "class_names", "source", "training", ... Never changes a number."""
    forward: Callable[..., Tensor] | None = None
    """What runs the network when it is wrapped (DDP, compile); None: the network itself."""
    preconditioning: Preconditioning | None = None
    """The network is EDM's bare F, told c_noise instead of `network_time`; it was trained to predict "sample"."""
    trained: Trained | None = None
    """The path and prediction the network itself knows, where `path` is another one: see `on_path`."""
    size: Size | None = None
    """Of states, where it is not the config's `input_size`: see `at_size`."""
    extrapolation: str = "none"
    """How the network meets positions outside the range that it was trained on: see `at_size`."""
    refiner: Denoiser | None = None
    """A small network of twice the channels that corrects an old velocity (FlowTurbo); plans say when it is asked."""
    guide: Denoiser | None = None
    """A worse model of the same data, for guidance against it (autoguidance); see `autoguided`."""
    own_plan: dict[str, Any] | None = None
    """The plan that a few-step model was made for, as `Plan.to_dict` writes it; `Plan.own` reads it."""

    def __post_init__(self) -> None:
        if self.preconditioning is not None and self.native.prediction != "sample":
            raise ConfigError(
                f"a preconditioned network predicts 'sample', not {self.native.prediction!r}; on_path(path, "
                f"prediction=...) gives other kinds"
            )

    def __call__(
        self,
        x: Tensor,
        t: float | Tensor,
        cond: Tensor,
        compute: Compute | None = None,
        lands: float | Tensor | None = None,
    ) -> Prediction:
        """Predict at states x (B, C, H, W), house time t (number or (B,)), labels cond (B,) int64.

        lands: house time (number or (B,)) that a flow map is told the step goes to: its answer is the prediction whose
        DDIM step from t arrives there. None: the prediction at t itself, as of any other network.

        Differentiable; runs the weights as they are stored. `compute.merged` and `compute.precision` are matters of
        execution that the sampling engine realises, not of meaning. Raises ConfigError for a patch size or an exit
        that the network does not have.
        """
        compute = compute or Compute()
        if compute.refine:
            raise ConfigError("a refiner corrects what a run remembers: sample with a plan instead of calling it")
        if compute.scale is not None:
            self.refuse_jump("a scale")
            return self.low_band(compute)(x, t, cond, replace(compute, scale=None))
        time = torch.as_tensor(t, dtype=torch.float64, device=x.device)
        a = self.align(compute, time)
        told = self.told(time, a, compute, lands)
        raw = self.run(x if a is None else like(a.input_scale, x) * x, told, cond, compute)
        return self._read(raw, x, time, compute, a)

    def packed(
        self,
        xs: Sequence[Tensor],
        t: Tensor,
        cond: Tensor,
        compute: Compute | None = None,
        taps: Taps | None = None,
    ) -> list[Prediction]:
        """Predict at states of several sizes in one pass: xs[g] (B_g, C, *size_g); t and cond (sum of B_g,), in order.

        As a call per group would, up to rounding. taps: hidden states to be filled in, of flexible networks. Raises
        ConfigError for networks that take one size only.
        """
        core, compute = self.core, compute or Compute()
        patch = self.patch_of(compute)
        times = torch.as_tensor(t, dtype=torch.float64, device=xs[0].device).split([len(x) for x in xs])
        aligned = [self.align(compute, time) for time in times]
        scaled = [x if a is None else like(a.input_scale, x) * x for x, a in zip(xs, aligned, strict=True)]
        told = torch.cat([self.encode(time if a is None else a.time) for time, a in zip(times, aligned, strict=True)])
        more = {} if taps is None else {"taps": taps}
        raws = core.forward_packed(scaled, told.to(torch.float32), cond, patch, self.extrapolation, **more)
        parts = zip(raws, xs, times, aligned, strict=True)
        return [self._read(raw, x, time, compute, a) for raw, x, time, a in parts]

    def _read(self, raw: Tensor, x: Tensor, time: Tensor, compute: Compute, a: Alignment | None) -> Prediction:
        """The network's raw output for states x as a prediction."""
        value, variance = self.split(raw)
        if a is not None:
            value = like(a.on_state, x) * x + like(a.on_output, x) * value
            if math.prod(ratio := self.coarse_ratio(compute)) != 1:
                value = value + like(a.on_coarse, x) * coarse(x, patch_pair(ratio))
        return Prediction(value, self.prediction, x, time, self.path, variance)

    def exit_predictions(self, x: Tensor, t: float | Tensor, cond: Tensor) -> tuple[Prediction, dict[int, Prediction]]:
        """The full prediction and every exit's by depth, from one pass; only exits are differentiated.

        Arguments as a call's. Raises ConfigError for a network without exits.
        """
        network, compute = self.network, Compute()
        if not isinstance(network, ExitDiT):
            raise ConfigError("this model has no exits; pliant.attach_exits adds them")
        time = torch.as_tensor(t, dtype=torch.float64, device=x.device)
        self.refuse_jump("exits")
        a = self.align(compute, time)
        steps = self.encode(time if a is None else a.time).to(torch.float32).expand(x.shape[0])
        full, exits = network.forward_all(x if a is None else like(a.input_scale, x) * x, steps, cond)
        return self._read(full, x, time, compute, a), {
            depth: self._read(raw, x, time, compute, a) for depth, raw in exits.items()
        }

    def run(self, x: Tensor, network_time: Tensor, cond: Tensor, compute: Compute) -> Tensor:
        """The bare network: (B, C, H, W) and *network* time (scalar or (B,)) -> (B, out_channels, H, W).

        Of a flow map network times are pairs, (2,) or (B, 2).
        """
        if cond.shape != x.shape[:1]:
            raise ShapeError(f"{x.shape[0]} states need as many labels, got {tuple(cond.shape)}")
        steps = network_time.to(torch.float32).expand(x.shape[0], *self.pair)
        call = self.forward or self.network
        leave = self.exit_of(compute)
        if leave is not None:
            out: Tensor = call(x, steps, cond, compute.patch, leave)
        elif isinstance(self.core, FlexiDiT):
            out = call(x, steps, cond, compute.patch)
        elif self.core.any_size:
            out = call(x, steps, cond, self.patch_of(compute), self.extrapolation)
        else:
            if compute.patch not in (None, self.config.patch_size):
                raise ConfigError(
                    f"this model only has patch size {self.config.patch_size}, not {compute.patch}; "
                    f"add it with pliant.flexify"
                )
            out = call(x, steps, cond)
        return out

    def split(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Raw output -> (value in house sign, variance code or None)."""
        variance = None
        if self.config.learn_sigma:
            raw, variance = raw.chunk(2, dim=1)
        if self.native.prediction == "velocity" and self.network_time.sign < 0:
            raw = -raw
        return raw, variance

    def encode(self, time: Tensor) -> Tensor:
        """House time on the network's own path (any shape) as the network wants it."""
        if self.preconditioning is None:
            return self.network_time.encode(time)
        return self.preconditioning.c_noise(self.native.path.noise_ratio(time))

    @property
    def pair(self) -> tuple[int, ...]:
        """Shape of what the network is told of time per sample: () or, of a flow map, (2,)."""
        return (2,) if self.config.flow_map else ()

    def told(
        self, time: Tensor, a: Alignment | None, compute: Compute, lands: float | Tensor | None = None
    ) -> Tensor:
        """What calls at house times (any shape) are told: network times of that shape, of a flow map (..., 2).

        a: how these calls are aligned (`align`).
        """
        here = self.encode(time if a is None else a.time)
        if not self.config.flow_map:
            if lands is not None:
                raise ConfigError("this network is not told where a step lands; only flow maps are")
            return here
        if lands is None:
            return torch.stack((here, here), dim=-1)
        end = torch.as_tensor(lands, dtype=torch.float64, device=time.device)
        b = self.align(compute, end)
        return torch.stack(torch.broadcast_tensors(here, self.encode(end if b is None else b.time)), dim=-1)

    def refuse_jump(self, feature: str) -> None:
        """Raise ConfigError for a flow map, where `feature` has no meaning."""
        if self.config.flow_map:
            raise ConfigError(f"{feature} and flow maps do not go together; use the model it was distilled from")

    # Other paths --------------------------------------------------------------------------------------------------

    @property
    def native(self) -> Trained:
        """What the network itself was trained as."""
        return self.trained or Trained(self.path, self.prediction)

    def on_path(self, path: Path, prediction: PredictionType | None = None) -> Denoiser:
        """The same network as a denoiser of another path, and of another prediction kind if one is given.

        Times are matched by noise ratio and states rescaled (sheet C, 15.3); ratios that the network never saw are
        clipped to those it did: `match(t).clipped` says where, plans record it. Both paths need a Gaussian source.
        """
        native = self.native
        kind = self.prediction if prediction is None else prediction_type(prediction)
        for p in (native.path, path):
            _ = p.alpha_sigma(0.5)  # says what is wrong with a source that is not Gaussian
        same = path == native.path and kind == native.prediction
        plan = self.own_plan if (path, kind) == (self.path, self.prediction) else None
        return replace(self, path=path, prediction=kind, trained=None if same else native, own_plan=plan)

    def autoguided(self, guide: Denoiser) -> Denoiser:
        """The same denoiser with a worse one to be guided away from (arXiv 2406.02507): smaller, or trained less.

        Plans use it with `Guidance.auto(scale)`. Raises ConfigError unless both speak of the same states.
        """
        guide = guide if guide.path == self.path and guide.prediction == self.prediction else guide.on_path(
            self.path, self.prediction
        )
        if (guide.sample_shape, guide.num_classes) != (self.sample_shape, self.num_classes):
            raise ConfigError(
                f"a guide predicts the same states and classes: this model has {self.sample_shape} and "
                f"{self.num_classes} classes, the guide {guide.sample_shape} and {guide.num_classes}"
            )
        return replace(self, guide=guide)

    def match(self, t: float | Tensor) -> Match | None:
        """Where house times t lie on the path the network was trained on; None if it is this one."""
        return None if self.trained is None else match(self.trained.path, self.path, t)

    @property
    def known_noise(self) -> tuple[float, float] | None:
        """The least and most noise ratio (0 and inf possible) of a network trained on another path; else None."""
        if self.trained is None:
            return None
        low, high = (float(self.trained.path.noise_ratio(t)) for t in self.trained.path.trained_times)
        return low, high

    # Other sizes --------------------------------------------------------------------------------------------------

    def at_size(self, size: Sequence[int], extrapolation: str | None = None) -> Denoiser:
        """The same model of states of another size, (H, W) in its own pixels; without channels.

        extrapolation: how positions outside the trained range are met ("none", "ntk", "yarn", ...; None: as now). A
        size that the model was not trained on draws a warning. Raises ShapeError, with the nearest size that works, for
        one that a patch size does not divide, and for networks of one size.
        """
        wanted = tuple(size)
        method = self.extrapolation if extrapolation is None else extrapolation
        self.core.check_size(wanted)
        self.core.check_extrapolation(method)
        reason = self.core.beyond(wanted)
        if reason is not None:
            hint = f"with position extrapolation {method!r}" if method != "none" else "without position extrapolation"
            message = f"size {named(wanted)} is outside what this model was trained on ({reason}), {hint}"
            warnings.warn(message, stacklevel=2)
        own = None if wanted == tuple(self.config.input_size) else wanted
        guide = None if self.guide is None else self.guide.at_size(wanted, extrapolation)
        return replace(self, size=own, extrapolation=method, guide=guide)

    # What the network is ------------------------------------------------------------------------------------------

    @property
    def config(self) -> NetworkConfig:
        return self.network.config

    @property
    def dit_config(self) -> DiTConfig:
        """The config of a DiT. Raises ConfigError for another architecture."""
        return self.dit.config

    @property
    def sample_size(self) -> Size:
        """Of one state without its channels: (H, W)."""
        return self.size or tuple(self.config.input_size)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W) of one state; (C, T, H, W) of videos, (C, L) of signals."""
        return (self.config.in_channels, *self.sample_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W). Raises ConfigError for a model of anything but images."""
        size = self.sample_size
        if len(size) != 2:
            raise ConfigError(f"this needs a model of images; this one has states of {named(self.sample_shape)}")
        return self.config.in_channels, size[0], size[1]

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def null_label(self) -> int:
        """The label of an unconditional call. Raises ConfigError for a network trained without one."""
        if self.config.class_dropout == 0:
            raise ConfigError("this model was trained without label dropout, so it has no unconditional mode")
        return self.config.num_classes

    @property
    def class_names(self) -> list[str]:
        names = self.metadata.get("class_names")
        return list(names) if names else [str(i) for i in range(self.num_classes)]

    @property
    def core(self) -> Backbone:
        """The network without its exits or routers."""
        return self.network if isinstance(self.network, Backbone) else self.network.base

    @property
    def dit(self) -> DiT | FlexiDiT:
        """`core` as a DiT. Raises ConfigError for another architecture."""
        core = self.core
        if not isinstance(core, DiT | FlexiDiT):
            raise ConfigError(f"this needs a DiT; the model is a {core.family} network")
        return core

    @property
    def exit_depths(self) -> tuple[int, ...]:
        """Blocks before each exit, ascending; empty for a network without exits."""
        return self.network.exit_depths if isinstance(self.network, ExitDiT) else ()

    def exit_of(self, compute: Compute) -> int | None:
        """The exit a compute leaves through, None for full depth. Raises ConfigError if it cannot run here."""
        depth = compute.exit
        if depth is None:
            return None
        if not isinstance(self.network, ExitDiT):
            raise ConfigError(f"this model has no exit after {depth} blocks; pliant.attach_exits adds exits")
        self.network.exit(depth)
        self.network.check_patch(compute.patch)
        return depth

    def network_for(self, compute: Compute) -> Backbone:
        """What a compute runs: the network without exits, one of exit + 1 blocks (`exit_network`), or one on a smaller
        grid. Of a network with routed width the base, from which `width_variants` are cut."""
        if compute.scale is not None:
            network: DiT = self.low_band(compute).coarse.network  # type: ignore[assignment]
            return network
        depth = self.exit_of(compute)
        if depth is None or not isinstance(self.network, ExitDiT):
            return self.core
        return self.network.exit_network(depth)

    @property
    def patch_sizes(self) -> tuple[Size, ...]:
        """All patch sizes, the powerful (original) one first."""
        return self.core.patch_sizes

    def patch_of(self, compute: Compute) -> Size:
        """The patch size a compute means for this network. Raises ConfigError if the network does not have it."""
        if compute.patch is None:
            return self.config.patch_size
        for patch in self.patch_sizes:
            if patch == compute.patch:
                return patch
        known = ", ".join("x".join(map(str, p)) for p in self.patch_sizes)
        wanted = "x".join(map(str, compute.patch))
        raise ConfigError(f"this model has patch sizes {known}, not {wanted}; add it with pliant.flexify")

    def low_band(self, compute: Compute) -> LowBandDenoiser:
        """What answers calls at `compute.scale`. Raises ConfigError or ShapeError where that smaller grid is none."""
        from pliant.adapters.low_band_denoiser import LowBandDenoiser

        if compute.scale is None:
            raise ConfigError("this compute asks for no scale")
        return LowBandDenoiser(self, compute.scale)

    def align(self, compute: Compute, t: Tensor) -> Alignment | None:
        """How calls with this compute at house times t (any shape) are fed and read; None: as they are.

        Raises ConfigError where the network's prediction does not say what is asked of it.
        """
        return aligning.align(self, compute, t)

    def coarse_ratio(self, compute: Compute) -> Size:
        """How much coarser this compute's patches are, per axis."""
        patch, own = self.patch_of(compute), self.config.patch_size
        return tuple(p // o for p, o in zip(patch, own, strict=True))

    # What it costs ------------------------------------------------------------------------------------------------

    def shape(self, compute: Compute | None = None) -> TransformerShape:
        """The call's shape for the cost model."""
        return call_cost.shape(self, compute or Compute())

    def flops(
        self, compute: Compute | None = None, convention: Convention = MATMUL, t: float | None = None
    ) -> int:
        """FLOPs of one call for one image; a multiply-add counts 2.

        t: house time, on which the cost of a network with routed width depends; None: at full width. Tokens that such a
        network skips depend on the image and are not deducted: this is the most that it can cost (see `least_flops`).
        """
        return call_cost.flops(self, compute or Compute(), convention, t)

    def least_flops(self, compute: Compute, convention: Convention = MATMUL, t: float | None = None) -> int:
        """FLOPs of one call if its gate reuses, or if its token routers let every token pass the MLPs by.

        The same as `flops` where nothing is decided while sampling. t: as for `flops`.
        """
        return call_cost.least_flops(self, compute, convention, t)

    @property
    def num_sites(self) -> int:
        """Residual branches of the network at full depth: attention and MLP of every block."""
        return 2 * self.config.depth

    # Housekeeping -------------------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.network.parameters()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: str | torch.device) -> Denoiser:
        """Moves the network in place and returns self, as modules do."""
        self.network.to(device)
        for other in (self.guide, self.refiner):
            if other is not None:
                other.to(device)
        return self

    def through(self, forward: Callable[..., Tensor]) -> Denoiser:
        """The same denoiser whose network is run by a wrapper (DDP, torch.compile)."""
        return replace(self, forward=forward)

    def identity(self) -> dict[str, Any]:
        """What a plan needs to know to recognise this model: architecture and conventions, not weights."""
        return identities.identity(self)

    def fingerprint(self) -> str:
        """12 hex digits that recognise the model a plan was made for: `identity()` without what was added to it.

        Fine-tuned, flexified and exit-bearing relatives share it; whether they have the patch sizes and exits a plan
        asks for is checked there.
        """
        return identities.fingerprint(self)
