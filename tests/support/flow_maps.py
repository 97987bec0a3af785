"""Stand-ins for denoisers whose flow maps are known in closed form, and a small one that can be trained."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pliant.denoiser import Prediction
from pliant.paths import get_path, like

LINEAR = get_path("linear")


class Stub:
    """What objectives ask of a denoiser on the linear path: `value(x, t, s)` is its velocity for a step t -> s."""

    path = LINEAR
    prediction = "velocity"
    null_label = 1

    def __init__(self, value, flow_map: bool = True) -> None:
        self.value = value
        self.config = SimpleNamespace(flow_map=flow_map)

    def __call__(self, x, t, labels, compute=None, lands=None) -> Prediction:
        t = torch.as_tensor(t, dtype=torch.float64).expand(x.shape[0])
        lands = t if lands is None else torch.as_tensor(lands, dtype=torch.float64).expand(x.shape[0])
        return Prediction(self.value(x, t, lands), "velocity", x, t, LINEAR)

    def flops(self) -> float:
        return 1.0


def spread(t: Tensor, std: float) -> Tensor:
    """Of the states at t when the data is N(0, std^2)."""
    return ((1 - t) ** 2 * std**2 + t**2).sqrt()


def gaussian_velocity(x: Tensor, t: Tensor, std: float) -> Tensor:
    """The exact velocity at states x (B, ...) for data N(0, std^2): x * d/dt ln spread."""
    return x * like((t - (1 - t) * std**2) / spread(t, std) ** 2, x)


def gaussian_teacher(std: float = 0.5) -> Stub:
    return Stub(lambda x, t, s: gaussian_velocity(x, t, std), flow_map=False)


def gaussian_map(std: float = 0.5) -> Stub:
    """The exact flow map (sheet H, 5.1): `u = x (1 - spread(s)/spread(t)) / (t - s)`."""

    def value(x, t, s):
        length = t - s
        still = length.abs() < 1e-12
        safe = torch.where(still, torch.ones_like(length), length)
        jump = x * like((1 - spread(s, std) / spread(t, std)) / safe, x)
        return torch.where(like(still, x).bool(), gaussian_velocity(x, t, std), jump)

    return Stub(value)


def mixture_velocity(x: Tensor, t: Tensor, centre: float = 1.0, std: float = 0.2) -> Tensor:
    """Of .5 N(-centre, std^2) + .5 N(centre, std^2) in every coordinate (sheet H, 8): E[x1 - x0 | x]."""
    a, b = like(1 - t, x), like(t, x)
    var = a**2 * std**2 + b**2
    mean = centre * torch.tanh(a * centre * x / var)  # posterior mean of the component's centre
    x0 = mean + std**2 * a / var * (x - a * mean)
    noise = b / var * (x - a * mean)
    return noise - x0


def mixture_teacher() -> Stub:
    return Stub(lambda x, t, s: mixture_velocity(x, t), flow_map=False)


def mixture_samples(n: int, generator: torch.Generator) -> Tensor:
    """(n, 1, 1, 1) samples of the mixture."""
    side = 2.0 * torch.randint(2, (n, 1, 1, 1), generator=generator) - 1.0
    return side + 0.2 * torch.randn(n, 1, 1, 1, generator=generator)


class ToyMap(Stub):
    """A small trainable network for one number: its velocity at t for a step to s."""

    def __init__(self, flow_map: bool = True, width: int = 96, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            hidden = [nn.Linear(width, width) for _ in range(2)]
            layers = [nn.Linear(7, width), nn.SiLU(), hidden[0], nn.SiLU(), hidden[1], nn.SiLU()]
            self.network = nn.Sequential()
            for k, layer in enumerate(layers):
                self.network.add_module(str(k), layer)
            self.network.add_module("head", nn.Linear(width, 1))
        super().__init__(self._value, flow_map)

    def _value(self, x, t, s):
        t, h = t.to(x.dtype)[:, None], (t - s).to(x.dtype)[:, None]
        flat = x.flatten(1)
        features = [flat, t, h, torch.sin(3 * t), torch.cos(3 * t), torch.sin(3 * h), torch.cos(3 * h)]
        return self.network(torch.cat(features, 1)).reshape(x.shape)
