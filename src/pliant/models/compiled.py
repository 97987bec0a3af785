"""Blocks compiled by PyTorch's inductor with their weights folded in as constants ("freezing").

Compiled once per block and input shape, at the first call, which takes seconds. Weights are captured then: a later
change of a parameter does not reach the compiled code.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pliant.errors import ConfigError
from pliant.models.layers import Block, Delta

Run = Callable[[Tensor, Tensor], Tensor]


def require_compiler(device: torch.device) -> None:
    """Raises ConfigError where inductor could not build code for this device: without a C++ compiler, for a CPU."""
    if device.type != "cpu":
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError) as error:
        raise ConfigError(
            "precision 'bf16-compiled' needs a C++ compiler and found none: install g++, or name one in the "
            "environment variable CXX, or use 'bf16'."
        ) from error


class CompiledBlock(Block):
    """A block that shares the parameters of another and runs compiled, except with adapters, masks or gradients."""

    def __init__(self, block: Block) -> None:
        torch.nn.Module.__init__(self)
        self.heads, self.norm2_eps = block.heads, block.norm2_eps
        self.qkv, self.proj, self.fc1, self.fc2 = block.qkv, block.proj, block.fc1, block.fc2
        self._compiled: dict[tuple[Any, ...], Run] = {}

    def forward(
        self, x: Tensor, modulation: Tensor, loras: Mapping[str, Delta] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """As `Block.forward`."""
        differentiated = torch.is_grad_enabled() and (x.requires_grad or modulation.requires_grad)
        if loras or mask is not None or differentiated:
            return super().forward(x, modulation, loras, mask)
        # One function per kind of call, compiled once: no limit on recompilations, no silent fall-back to eager code.
        key = (x.shape, x.stride(), x.dtype, modulation.shape, modulation.stride(), torch.is_inference_mode_enabled())
        with torch.no_grad():
            if (run := self._compiled.get(key)) is not None:
                return run(x, modulation)
            return self._first(key, x, modulation)

    def _first(self, key: tuple[Any, ...], x: Tensor, modulation: Tensor) -> Tensor:
        from torch._inductor import config

        run: Run = torch.compile(fresh(self), fullgraph=True, dynamic=False)
        with config.patch(freezing=True):  # read while tracing as well, so that an option of torch.compile is too late
            out = run(x, modulation)
        self._compiled[key] = run
        return out


def fresh(block: Block) -> Run:
    """`block`'s plain forward as a function with a code object of its own.

    PyTorch keeps compiled code by code object: two blocks that shared one could be given each other's.
    """

    def run(x: Tensor, modulation: Tensor) -> Tensor:
        return Block.forward(block, x, modulation)

    return types.FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)
