"""A path: how data becomes noise. Time runs from t=0 (data) to t=1 (noise) everywhere inside Pliant.

    x_t = a(t)*x0 + b(t)*x1 + c(t)*z,        z ~ N(0, I)

Diffusion has b=0; rectified flow has c=0 and a source x1, usually N(0, I); stochastic interpolants have all three.
When the source is Gaussian, x1 and z merge into one noise eps ~ N(0, I) and the path is `alpha(t)*x0 + sigma(t)*eps`
with alpha = a and sigma = sqrt(b^2 + c^2): the view that predictions, solvers and log-SNR use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from pliant.errors import ConfigError, ShapeError, suggest
from pliant.paths.predictions import AlphaSigma, conversion


class Coefficients(NamedTuple):
    """Values and time derivatives of a, b, c. Float64 tensors of one shape."""

    a: Tensor
    b: Tensor
    c: Tensor
    da: Tensor
    db: Tensor
    dc: Tensor


def as_time(t: float | Tensor) -> Tensor:
    """`t` as a float64 tensor (any shape, on its device): coefficients are never computed in less."""
    return torch.as_tensor(t, dtype=torch.float64)


def like(t: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...) in x's dtype and device; a single number stays a scalar. The one place that broadcasts."""
    if t.ndim == 0:
        return t.to(x)
    if t.shape != x.shape[:1]:
        raise ShapeError(
            f"time has shape {tuple(t.shape)} but the batch is {x.shape[0]}; pass one time per sample or one number"
        )
    return t.to(x).reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Path(ABC):
    """Base of all paths. Frozen and serialisable: `to_config()` / `path_from_config()` round-trip."""

    name: ClassVar[str]
    gaussian_source: ClassVar[bool] = True

    @abstractmethod
    def coefficients(self, t: float | Tensor) -> Coefficients:
        """a, b, c and their derivatives at t in [0, 1] (any shape). Float64."""

    @abstractmethod
    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        """The t in [0, 1] at which `self.log_snr(t) == log_snr`; values beyond the path's ends give the ends."""

    @property
    def trained_times(self) -> tuple[float, float]:
        """(least, most noisy): the times that networks of this path are trained on; `on_path` clips to them."""
        return 0.0, 1.0

    def offset(self, t: float | Tensor) -> Tensor:
        """beta(t) of paths that drift to a known image mu, `x_t = alpha*x0 + sigma*eps + beta*mu`; zero on all others.

        Everything else this class says about such a path is about `x_t - beta*mu`. Float64, of t's shape.
        """
        return torch.zeros_like(as_time(t))

    def sample_noise(self, shape: Sequence[int], generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Noise eps of `shape` (B, ...), on the generator's device: standard normal unless the path has its own law."""
        return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=generator.device)

    def alpha_sigma(self, t: float | Tensor) -> AlphaSigma:
        """The Gaussian view (alpha, sigma, dalpha, dsigma) at t. Raises ConfigError if the source is not Gaussian."""
        if not self.gaussian_source:
            raise ConfigError(
                f"path {self.name!r} has a source that is not Gaussian, so it has no alpha/sigma view; its velocities "
                f"are sampled from images of the source through pliant.adapters.transport"
            )
        a, b, c, da, db, dc = self.coefficients(t)
        sigma = torch.hypot(b, c)
        # d sqrt(b^2+c^2)/dt; with only one of them present it is that one's own derivative, also where it is 0.
        safe = torch.where(sigma > 0, sigma, 1.0)
        dsigma = torch.where(sigma > 0, (b * db + c * dc) / safe, torch.hypot(db, dc))
        return AlphaSigma(a, sigma, da, dsigma)

    def log_snr(self, t: float | Tensor) -> Tensor:
        """Half log-SNR `ln(alpha/sigma)` (DPM-Solver's lambda): +inf where sigma = 0, -inf where alpha = 0."""
        s = self.alpha_sigma(t)
        return torch.log(s.alpha) - torch.log(s.sigma)

    def noise_ratio(self, t: float | Tensor) -> Tensor:
        """`sigma/alpha`, EDM's sigma: 0 at data, grows with t."""
        s = self.alpha_sigma(t)
        return s.sigma / s.alpha

    def time_of_noise_ratio(self, ratio: float | Tensor) -> Tensor:
        """Inverse of `noise_ratio`."""
        return self.time_of_log_snr(-torch.log(as_time(ratio)))

    def interpolate(self, x0: Tensor, x1: Tensor, z: Tensor, t: float | Tensor) -> Tensor:
        """x_t for data x0, source x1 and latent noise z (B, ...), any source; t a number or (B,)."""
        s = self.coefficients(t)
        return like(s.a, x0) * x0 + like(s.b, x0) * x1 + like(s.c, x0) * z

    def mix(self, x0: Tensor, eps: Tensor, t: float | Tensor, mu: Tensor | None = None) -> Tensor:
        """x_t for data x0 and noise eps (B, ...); t a number or (B,). mu: what a path with an offset drifts to."""
        s = self.alpha_sigma(t)
        x = like(s.alpha, x0) * x0 + like(s.sigma, x0) * eps
        return x if mu is None else x + like(self.offset(t), x0) * mu

    def target(self, kind: str, x0: Tensor, eps: Tensor, t: float | Tensor) -> Tensor:
        """The exact prediction of `kind` for the pair (x0, eps) at t: what a network is trained to output."""
        s = self.alpha_sigma(t)
        x = like(s.alpha, x0) * x0 + like(s.sigma, x0) * eps
        # From whichever of x0 / eps is well determined by x at every t the caller may use: velocity-like kinds are
        # linear in both, so going through the pair itself avoids dividing by alpha or sigma.
        if kind == "sample":
            return x0
        if kind == "epsilon":
            return eps
        if kind == "velocity":
            return like(s.dalpha, x0) * x0 + like(s.dsigma, x0) * eps
        if kind == "v_prediction":
            return like(s.alpha, x0) * eps - like(s.sigma, x0) * x0
        p, q = conversion("epsilon", kind, s)
        return like(p, x0) * x + like(q, x0) * eps

    def convert(
        self, value: Tensor, x: Tensor, t: float | Tensor, kind_from: str, kind_to: str, mu: Tensor | None = None
    ) -> Tensor:
        """A prediction (B, ...) at state x of one kind as another kind. Identity (the same tensor) for equal kinds.

        mu: what a path with an offset drifts to. Raises ConfigError for velocities there: they are ambiguous (with or
        without beta'*mu).
        """
        if kind_from == kind_to:
            return value
        if mu is not None:
            if moving := sorted({"velocity", "v_prediction"} & {kind_from, kind_to}):
                raise ConfigError(f"on a path with an offset {moving[0]!r} is ambiguous; use 'epsilon' or 'sample'")
            # x0 and eps keep their meaning, and x - beta*mu = alpha*x0' + sigma*eps is the plain path.
            x = x - like(self.offset(t), x) * mu
        p, q = conversion(kind_from, kind_to, self.alpha_sigma(t))
        return like(p, x) * x + like(q, x) * value

    def to_config(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


_FAMILIES: dict[str, type[Path]] = {}


def register_path(cls: type[Path]) -> type[Path]:
    """Class decorator: makes a family known to `get_path` and to files."""
    _FAMILIES[cls.name] = cls
    return cls


def known_paths() -> tuple[str, ...]:
    """Names of all registered families, sorted."""
    return tuple(sorted(_FAMILIES))


def path_from_config(config: dict[str, Any]) -> Path:
    """Inverse of `Path.to_config`. Raises ConfigError for an unknown name or field."""
    if not isinstance(config, dict):
        raise ConfigError(f'path is {config!r}; expected an object like {{"name": "linear"}}')
    fields = dict(config)
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in _FAMILIES:
        raise ConfigError(f"unknown path {name!r}: {suggest(str(name), _FAMILIES)}")
    try:
        return _FAMILIES[name](**fields)
    except TypeError as error:
        raise ConfigError(f"path {name!r} does not take these fields: {error}") from None


def get_path(name: str | Path, **options: Any) -> Path:
    """A path by family name, e.g. `get_path("vp-discrete", betas="scaled-linear")`; a Path is returned unchanged."""
    return name if isinstance(name, Path) else path_from_config({"name": name, **options})
