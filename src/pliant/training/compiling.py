"""Training with compiled blocks (`torch.compile`): one graph for all blocks of a network, which keeps its names."""

from __future__ import annotations

import torch
from torch import nn

from pliant.errors import ConfigError
from pliant.models.layers import Block
from pliant.models.rotary import RotaryBlock

BACKEND = "inductor"
_PACKED = ("attend", "mlp")
"""Methods that packs call: the sizes in a pack vary, these see one at a time."""


def compile_blocks(network: nn.Module) -> None:
    """Compile each block of a network, in place, at its first call. Raises ConfigError for networks without any.

    Nothing is wrapped, so parameters and files keep their names. Copies that are made of the network from now on still
    call this one's code: `plain_blocks` first.
    """
    blocks = _blocks(network)
    if not blocks:
        raise ConfigError("compile is for networks of transformer blocks (DiT, FiT, flexible); this one has none")
    for block in blocks:
        block.compile(backend=BACKEND)
        if isinstance(block, RotaryBlock):
            for name in _PACKED:
                setattr(block, name, torch.compile(getattr(block, name), backend=BACKEND, dynamic=True))


def plain_blocks(network: nn.Module) -> None:
    """Undo `compile_blocks`."""
    for block in _blocks(network):
        block._compiled_call_impl = None
        for name in _PACKED:
            vars(block).pop(name, None)


def _blocks(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, Block | RotaryBlock)]
