"""Number formats a network call can run in: named variants of a network that share every tensor they do not change.

`fp32`, `bf16`: everything in that format. `own`: as stored. `bf16-mixed`: products in bf16, residual stream as stored.
`bf16-compiled`: bf16 through torch.compile with weights frozen. `int8d`: 8-bit products of the blocks' linears, inputs
quantised as they come. Some blocks only: "0:4=int8d" (`block_precision.py`). Others: `register_precision`. Sheet E,
section 11; what each is worth: docs/precision.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import nn

from pliant.errors import ConfigError, suggest
from pliant.models.block_precision import is_by_blocks, makers_by_block, parse_block_precision
from pliant.models.dit import DiT
from pliant.models.layers import Block, OwnLinear
from pliant.models.network import Backbone

Builder: TypeAlias = Callable[[Any], Any]
"""A network -> another for inference that computes the same, in other numbers. The given one is left alone."""

BLOCK_LINEARS = ("qkv", "proj", "fc1", "fc2")
"""The linears that low-bit variants replace: nearly all of a call's products. Embedders, modulation, head stay."""


@lru_cache(maxsize=1)
def cpu_multiplies_bf16_faster() -> bool:
    """Whether this processor has bf16 matrix instructions."""
    import torch.backends.mkldnn as onednn

    return bool(onednn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bf16_units())


def _has_bf16_units() -> bool:
    flags = (getattr(torch.cpu, "_is_avx512_bf16_supported", None), getattr(torch.cpu, "_is_amx_tile_supported", None))
    return any(flag is not None and flag() for flag in flags)


def resolve_precision(key: str | None, network: Backbone) -> str:
    """The variant a call runs in. None: bf16 where the hardware multiplies it faster and the network is not tiny.

    Measured with AMX: 2.4x faster than fp32 at width 96 (batch 120), 1.9x at batch 30. Raises ConfigError for a name
    that is not registered.
    """
    if key is not None:
        check_precision(key)
        return key
    device = network.device.type
    fast = device == "cpu" and network.config.width >= 64 and cpu_multiplies_bf16_faster()
    if device == "cuda" or fast:
        return "bf16"
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(network.dtype, "own")


def check_precision(key: str | None, depth: int | None = None) -> None:
    """Raise ConfigError, with the nearest name, unless calls (of a network of `depth` blocks) can ask for it."""
    if key is not None and is_by_blocks(key):
        parse_block_precision(key)
        if depth is not None:
            makers_by_block(key, depth)
    elif key is not None and key not in VARIANTS:
        raise ConfigError(f"unknown precision {key!r}; {suggest(str(key), VARIANTS)}")


BackboneT = TypeVar("BackboneT", bound=Backbone)


def variant(network: BackboneT, key: str) -> BackboneT:
    """The plain network in the named precision. Raises ConfigError for an unknown one, or one it cannot run in here."""
    name = resolve_precision(key, network)
    by_blocks = is_by_blocks(name)
    if (by_blocks or name in OF_DIT) and not isinstance(network, DiT):
        raise ConfigError(f"precision {name!r} replaces parts of a DiT; a {network.family} network has fp32 and bf16")
    made: BackboneT = _by_blocks(network, name) if by_blocks else VARIANTS[name](network)
    return made


def known_precisions() -> tuple[str, ...]:
    """Names of all registered variants, sorted."""
    return tuple(sorted(VARIANTS))


def register_precision(name: str, builder: Builder) -> None:
    """Makes `Compute(precision=name)` run what the builder returns. Raises ConfigError if the name is taken."""
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"a precision needs a name, got {name!r}")
    if is_by_blocks(name):
        raise ConfigError(f"{name!r} cannot be a precision's name: '=' says which blocks")
    if name in VARIANTS:
        raise ConfigError(f"precision {name!r} is registered already; choose another name")
    VARIANTS[name] = builder


def converted(network: BackboneT, dtype: torch.dtype) -> BackboneT:
    """The network in another dtype, sharing its weights when nothing changes. The original is left alone."""
    return network if network.dtype == dtype else network.in_dtype(dtype)


def _float_base(network: DiT) -> tuple[DiT, torch.dtype]:
    """A copy to replace linears in, and its dtype: the network's own, or float32 where kernels do not know that."""
    dtype = network.head.weight.dtype
    dtype = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    return network.in_dtype(dtype), dtype


def with_linears(network: DiT, make: Callable[[nn.Linear, torch.dtype], OwnLinear]) -> DiT:
    """A copy whose blocks' linears are `make(linear, dtype of its output)`; all else is shared.

    What goes straight into another product (qkv, fc1) leaves in bf16; what enters the residual stream keeps its dtype.
    """
    return _with_linears(network, [make] * len(network.blocks))


def _with_linears(
    network: DiT, makers: Sequence[Callable[[nn.Linear, torch.dtype], OwnLinear] | None]
) -> DiT:
    """One maker per block; None leaves its linears."""
    copy, dtype = _float_base(network)
    for block, make in zip(copy.blocks, makers, strict=True):
        for name in BLOCK_LINEARS if make is not None else ():
            out = torch.bfloat16 if name in ("qkv", "fc1") else dtype
            setattr(block, name, make(getattr(block, name), out))  # type: ignore[misc]
    return copy


def _by_blocks(network: Any, key: str) -> Any:
    """Each block's linears in the format that the spans say."""
    if network.head.weight.device.type != "cpu" and "int8d" in key:
        raise ConfigError(f"precision {key!r}: 8 bits in some blocks only are for CPUs; use 'int8d' on a GPU")
    return _with_linears(network, makers_by_block(key, len(network.blocks)))


def bf16_mixed(network: DiT) -> DiT:
    """Products from bf16-stored weights, residual stream and norms as stored."""
    from pliant.models.mixed import MixedLinear

    return with_linears(network, MixedLinear)


def bf16_compiled(network: DiT) -> DiT:
    """bf16, each block compiled with its weights frozen at its first call (seconds per shape)."""
    from pliant.models.compiled import CompiledBlock, require_compiler

    require_compiler(network.head.weight.device)
    copy = network.in_dtype(torch.bfloat16)
    copy.blocks = nn.ModuleList([CompiledBlock(cast(Block, block)) for block in copy.blocks])
    return copy


def int8_dynamic(network: DiT) -> DiT:
    """int8 weights, one scale per output feature; inputs quantised per call. CPU: oneDNN; GPU: torchao."""
    if network.head.weight.device.type == "cpu":
        from pliant.models.int8 import Int8Linear

        return with_linears(network, Int8Linear)
    return _int8_torchao(network)


def _int8_torchao(network: DiT) -> DiT:
    """The same through torchao, whose int8 tensors sit inside ordinary linears; all else in bf16, a GPU's default."""
    try:
        torchao = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise ConfigError(
            "precision 'int8d' on a GPU needs torchao: pip install torchao, or use 'bf16' here."
        ) from error
    copy = network.in_dtype(torch.bfloat16)

    def of_a_block(module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear) and path.startswith("blocks.") and path.rsplit(".", 1)[-1] in BLOCK_LINEARS

    torchao.quantize_(copy, torchao.Int8DynamicActivationInt8WeightConfig(), filter_fn=of_a_block)
    return copy


OF_DIT = ("bf16-mixed", "bf16-compiled", "int8d")
"""Variants that replace parts of a DiT's blocks."""

VARIANTS: dict[str, Builder] = {
    "own": lambda network: network,
    "fp32": lambda network: converted(network, torch.float32),
    "bf16": lambda network: converted(network, torch.bfloat16),
    "bf16-mixed": bf16_mixed,
    "bf16-compiled": bf16_compiled,
    "int8d": int8_dynamic,
}
