"""Another number format for some of the blocks: "0:8=bf16-mixed,8:12=int8d" (sheet E, section 10.1).

The formats that can meet in one network are those that keep its residual stream and norms as stored: what goes from
block to block is then the same in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pliant.errors import ConfigError, suggest
from pliant.models.layers import OwnLinear

FORMATS = ("own", "bf16-mixed", "int8d")
_SPAN = re.compile(r"(\d+):(\d+)=(.+)")


@dataclass(frozen=True)
class BlockSpan:
    """Blocks first..last-1 in one format."""

    first: int
    last: int
    format: str


def is_by_blocks(key: str) -> bool:
    """Whether a precision is one of these, rather than a name."""
    return "=" in key


def parse_block_precision(key: str) -> tuple[BlockSpan, ...]:
    """The spans, in order; blocks of none of them stay as stored. Raises ConfigError for what is none, or overlaps."""
    spans: list[BlockSpan] = []
    for text in key.split(","):
        found = _SPAN.fullmatch(text.strip())
        if found is None:
            raise ConfigError(f"precision {key!r}: cannot read {text!r}; write first:last=format of blocks: 0:4=int8d")
        span = BlockSpan(int(found[1]), int(found[2]), found[3])
        if span.format not in FORMATS:
            known = ", ".join(FORMATS)
            raise ConfigError(f"precision {key!r}: some blocks can be {known}; {suggest(found[3], FORMATS)}")
        if span.first >= span.last or (spans and span.first < spans[-1].last):
            raise ConfigError(f"precision {key!r}: {text.strip()!r} is empty, or begins before the one before it ends")
        spans.append(span)
    return tuple(spans)


def makers_by_block(key: str, depth: int) -> list[Callable[[nn.Linear, torch.dtype], OwnLinear] | None]:
    """What makes each block's linears; None leaves them. Raises ConfigError for blocks that the network has not."""
    from pliant.models.int8 import Int8Linear
    from pliant.models.mixed import MixedLinear

    makers: dict[str, Callable[[nn.Linear, torch.dtype], OwnLinear] | None] = {
        "own": None, "bf16-mixed": MixedLinear, "int8d": Int8Linear,
    }  # fmt: skip
    found: list[Callable[[nn.Linear, torch.dtype], OwnLinear] | None] = [None] * depth
    for span in parse_block_precision(key):
        if span.last > depth:
            raise ConfigError(f"precision {key!r} is for blocks up to {span.last}, and this network has {depth}")
        found[span.first : span.last] = [makers[span.format]] * (span.last - span.first)
    return found
