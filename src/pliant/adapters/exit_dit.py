"""Early exits of a frozen DiT (Balcony, arXiv 2503.05005; sheet E, section 6).

Exit e reads the tokens after blocks 0..e-1, sends them through one trained block with its own adaLN modulation (of
the same conditioning vector) and then through the network's own, frozen head. The base is never changed: at full depth
it answers to the bit as before.

An exit can be *materialised* into a plain DiT of depth e+1, which is what inference runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.adapters.flexible_dit import FlexiDiT
from pliant.errors import ConfigError, suggest
from pliant.mappings import from_mapping, to_mapping
from pliant.models.dit import DiT, DiTConfig, scale_rows

Gates: TypeAlias = Literal["copy", "zero"]


@dataclass(frozen=True)
class ExitSpec:
    """What `attach_exits` adds to a network. Frozen and serialisable."""

    depths: tuple[int, ...]
    """Exit e leaves after e blocks of the base, 1 <= e < L."""
    gates: Gates = "copy"
    """Of a new exit's residual branches: "copy" the last block's with the rest of it; "zero": the block starts as
    the identity, which suits exits close to the end only."""

    def __post_init__(self) -> None:
        if not self.depths:
            raise ConfigError("exits need at least one depth, e.g. depths=(2, 4)")
        for depth in self.depths:
            if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
                raise ConfigError(f"an exit's depth is the number of blocks before it, at least 1; got {depth!r}")
        object.__setattr__(self, "depths", tuple(sorted(set(self.depths))))
        if self.gates not in get_args(Gates):
            raise ConfigError(f"gates={self.gates!r} is unknown: {suggest(str(self.gates), get_args(Gates))}")

    def check(self, config: DiTConfig) -> None:
        """Refuse depths that this network does not have. Raises ConfigError naming the depth."""
        if self.depths[-1] >= config.depth:
            raise ConfigError(
                f"an exit after {self.depths[-1]} blocks saves nothing: the model has {config.depth}, "
                f"so exits can be at 1 to {config.depth - 1}"
            )

    def to_dict(self) -> dict[str, Any]:
        return to_mapping(self)

    @staticmethod
    def from_dict(config: dict[str, Any]) -> ExitSpec:
        """Inverse of `to_dict`. Raises ConfigError naming an unknown field."""
        return from_mapping(ExitSpec, config, "option of exits")


class Exit(nn.Module):
    """One block and its adaLN linear: 18 D^2 weights at mlp_ratio 4. Starts as a copy of the base's last block."""

    def __init__(self, base: DiT, spec: ExitSpec) -> None:
        super().__init__()
        width, last = base.config.width, 6 * base.config.depth
        self.block = copy.deepcopy(base.blocks[-1])
        with torch.device("meta"):  # nothing is drawn: every number is copied
            self.modulation = nn.Linear(width, 6 * width)
        weight, bias = (
            _rows_of(p.detach(), last - 6, last, width).clone() for p in (base.modulation.weight, base.modulation.bias)
        )
        if spec.gates == "zero":
            for tensor in (weight, bias):
                for row in (2, 5):
                    tensor[row * width : (row + 1) * width] = 0
        self.modulation.load_state_dict({"weight": weight, "bias": bias}, assign=True)
        self.requires_grad_(True)

    def forward(self, tokens: Tensor, signal: Tensor) -> Tensor:
        """Tokens (B, N, D) and activated conditioning (B, D) -> (B, N, D)."""
        rows = self.modulation(signal).view(len(signal), 6, -1)
        out: Tensor = self.block(tokens, rows + scale_rows(1, rows)[:6])
        return out


class ExitDiT(nn.Module):
    """A frozen network and its exits. Build with `pliant.attach_exits`, or from a stored spec."""

    def __init__(self, base: DiT | FlexiDiT, spec: ExitSpec) -> None:
        """`base` is shared and frozen. Raises ConfigError for depths it lacks, and for a base of recipe "shared"."""
        super().__init__()
        if isinstance(base, FlexiDiT) and base.spec.recipe != "lora":
            raise ConfigError(
                "exits need a network with blocks of its own: this one is flexible with recipe 'shared'; attach them "
                "to a plain model, or to one flexified with recipe 'lora'"
            )
        self.spec = spec
        self.base = base
        self.config: DiTConfig = base.config
        spec.check(self.config)
        self.exits = nn.ModuleDict({str(e): Exit(self.plain, spec) for e in spec.depths})
        self.base.requires_grad_(False)

    @property
    def plain(self) -> DiT:
        """The DiT at the original patch size."""
        return self.base.base if isinstance(self.base, FlexiDiT) else self.base

    @property
    def exit_depths(self) -> tuple[int, ...]:
        """Blocks of the base before each exit, ascending."""
        return self.spec.depths

    def exit(self, depth: int) -> Exit:
        """The exit after so many blocks. Raises ConfigError if there is none."""
        if depth not in self.exit_depths:
            known = ", ".join(map(str, self.exit_depths))
            raise ConfigError(f"this model has exits after {known} blocks, not after {depth}; see pliant.attach_exits")
        return cast(Exit, self.exits[str(depth)])

    def exit_config(self, depth: int) -> DiTConfig:
        """The config of an exit as a network of its own, `depth + 1` blocks. Raises ConfigError if there is none."""
        self.exit(depth)
        return config_of_exit(self.config, depth)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, patch: tuple[int, int] | None = None, exit: int | None = None
    ) -> Tensor:
        """As `FlexiDiT.forward`, leaving through an exit (None: full depth). Exits run at the original patch only."""
        if exit is None:
            return self._full(x, t, y, patch)
        head = self.exit(exit)
        self.check_patch(patch)
        plain = self.plain
        signal = conditioning(plain, t, y)
        rows = self._modulations(signal, 0, 6 * exit)
        rows = rows + scale_rows(exit, rows)[:-2]
        tokens = plain.embed(x)
        for i in range(exit):
            tokens = plain.blocks[i](tokens, rows[:, 6 * i : 6 * i + 6])
        last = self._modulations(signal, 6 * self.config.depth, 6 * self.config.depth + 2)
        return plain.read(head(tokens, signal), last + scale_rows(0, last))

    def check_patch(self, patch: tuple[int, ...] | None) -> None:
        """Raises ConfigError for a patch size that exits cannot run at."""
        own = self.config.patch_size
        if patch not in (None, own):
            raise ConfigError(f"exits run at the model's own patch size {own[0]}x{own[1]} only: drop patch or exit")

    def _full(self, x: Tensor, t: Tensor, y: Tensor, patch: tuple[int, int] | None) -> Tensor:
        if isinstance(self.base, FlexiDiT):
            out: Tensor = self.base(x, t, y, patch)
        else:
            self.check_patch(patch)
            out = self.base(x, t, y)
        return out

    def _modulations(self, signal: Tensor, first: int, last: int) -> Tensor:
        """Rows first..last-1 of the base's adaLN linear: activated conditioning (B, D) -> (B, last-first, D)."""
        linear, width = self.plain.modulation, self.config.width
        rows = F.linear(signal, *(_rows_of(p, first, last, width) for p in (linear.weight, linear.bias)))
        return rows.view(len(signal), last - first, width)

    def forward_all(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The full output and every exit's from one pass over the blocks, (B, out_channels, H, W) each.

        Gradients reach the exits only. The full output is bit-equal to `forward`'s.
        """
        plain, seen = self.plain, {}
        with torch.no_grad():
            signal, rows = conditioning(plain, t, y), plain.modulations(t, y)
            tokens = plain.embed(x)
            for i, block in enumerate(plain.blocks):
                if i in self.exit_depths:
                    seen[i] = tokens
                tokens = block(tokens, rows[:, 6 * i : 6 * i + 6])
            full = plain.read(tokens, rows)
        return full, {e: plain.read(self.exit(e)(tokens, signal), rows) for e, tokens in seen.items()}

    @torch.no_grad()
    def exit_network(self, depth: int) -> DiT:
        """A plain DiT of `depth + 1` blocks that computes an exit, for inference.

        Shares every tensor with this network but the adaLN linear, whose rows are gathered into one matrix as they
        are now: make it anew after training on. Raises ConfigError if there is no such exit.
        """
        own, plain, width, total = self.exit(depth), self.plain, self.config.width, self.config.depth
        names = tuple(f"blocks.{i}." for i in range(depth, total))
        state = {k: v for k, v in plain.state_dict().items() if not k.startswith(names)}
        state |= {f"blocks.{depth}.{name}": tensor for name, tensor in own.block.state_dict().items()}
        for name, tensor in own.modulation.state_dict().items():
            rows = state[f"modulation.{name}"]
            parts = (_rows_of(rows, 0, 6 * depth, width), tensor, _rows_of(rows, 6 * total, 6 * total + 2, width))
            state[f"modulation.{name}"] = torch.cat(parts)
        with torch.device("meta"):
            network = DiT(self.exit_config(depth))
        network.load_state_dict(state, assign=True)
        network.positions = plain.positions
        return network.requires_grad_(False).eval()

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Only the exits' tensors: small enough to share on their own."""
        return {f"exits.{name}": tensor for name, tensor in self.exits.state_dict().items()}

    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `adapter_state_dict`. Raises ConfigError naming tensors that are missing or do not belong."""
        expected = self.adapter_state_dict()
        wrong = sorted(set(expected) ^ set(state)) or [k for k in expected if expected[k].shape != state[k].shape]
        if wrong:
            raise ConfigError(f"these exits were made for another model: tensor {wrong[0]!r} does not match")
        self.exits.load_state_dict({name.removeprefix("exits."): tensor for name, tensor in state.items()})


def config_of_exit(config: DiTConfig, depth: int) -> DiTConfig:
    """A DiT's config cut down to its first `depth` blocks and an exit's, which is shaped like the last one."""
    cut = {"block_heads": config.block_heads, "block_hidden": config.block_hidden}
    widths: dict[str, Any] = {name: (*each[:depth], each[-1]) for name, each in cut.items() if each}
    return replace(config, depth=depth + 1, **widths)


def conditioning(network: DiT, t: Tensor, y: Tensor) -> Tensor:
    """What a DiT's adaLN linear reads: (B,) network times and (B,) labels -> (B, D)."""
    return F.silu(network.embed_time(t) + network.label_embed(y))


def depths_of(depths: Iterable[int]) -> tuple[int, ...]:
    """Depths as a spec wants them. Raises ConfigError for what is not a sequence of numbers."""
    if isinstance(depths, int | str):
        raise ConfigError(f"depths is a sequence of numbers of blocks, e.g. (2, 4); got {depths!r}")
    return tuple(depths)


def _rows_of(parameter: Tensor, first: int, last: int, width: int) -> Tensor:
    """Vectors first..last-1 of a stacked adaLN weight (n*D, D) or bias (n*D,)."""
    return parameter[first * width : last * width]
