"""Fully sharded training (FSDP2): every process keeps a slice of the weights, gradients, averages and optimizer state.

`accelerate launch --config_file configs/accelerate/fsdp.yaml` asks for it, starts the processes and gives the options.
The sharding itself is torch's `fully_shard`, block by block, on GPUs and on CPUs (where accelerate's own is not open).
What reaches the disk is whole: checkpoints and models are those of an unsharded run, and either kind of run resumes the
other's.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from typing import Any, cast

import accelerate
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.models.layers import Block
from pliant.models.rotary import RotaryBlock
from pliant.training.objectives import DDPM, AnySizeFlow, FlowMatching, Objective, PatchDistillation, SharedPatches
from pliant.training.sharded import whole


def sharding_asked(accelerator: accelerate.Accelerator) -> FullyShardedDataParallelPlugin | None:
    """The options of a launch that asks for FSDP; None for other launches and for a lone process.

    Raises ConfigError for options that Pliant's training does not have.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true" or not dist.is_initialized():
        return None
    # On CPUs accelerate reads the options and then forgets them.
    known = vars(accelerator.state).get("fsdp_plugin")
    plugin = cast(FullyShardedDataParallelPlugin, known or FullyShardedDataParallelPlugin())
    if plugin.fsdp_version != 2:
        raise ConfigError("sharded training is FSDP2: write `fsdp_version: 2` in the accelerate config")
    if plugin.activation_checkpointing:
        raise ConfigError("leave fsdp_activation_checkpointing out; write `checkpointing: true` in the training config")
    return plugin


def check_sharded(objective: Objective) -> None:
    """Raises ConfigError for objectives that look at whole averages or differentiate forwards."""
    of: Any = getattr(objective, "flow", getattr(objective, "own", objective))  # aligned and shared ones hold theirs
    if not isinstance(of, FlowMatching | AnySizeFlow | DDPM | PatchDistillation):
        raise ConfigError(
            f"sharded training knows the objectives flow_matching, any_size, ddpm, shared and distill, not "
            f"{type(objective).__name__}; train it without FSDP"
        )
    if isinstance(objective, SharedPatches) and objective.mmd is not None:
        raise ConfigError("sharded training does not know objective.mmd; train it without FSDP")


def shard(step: nn.Module, network: nn.Module, plugin: FullyShardedDataParallelPlugin, device: torch.device) -> None:
    """Shard a module whose `forward` does a step: each block of the network is gathered when it runs, the rest at once.

    In place; its parameters move to the device, shard by shard.
    """
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "offload_policy": plugin.cpu_offload,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
    }
    for block in _blocks(network):
        fully_shard(block, **options, reshard_after_forward=plugin.reshard_after_forward)
        if isinstance(block, RotaryBlock):
            register_fsdp_forward_method(block, "packed")
    fully_shard(step, **options)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Blocks that only ever run as a whole, so that they can be gathered when they do."""
    from pliant.adapters import FlexiDiT
    from pliant.models.dit import DiT
    from pliant.models.fit import FiT
    from pliant.models.flexible import FlexibleTransformer

    if not isinstance(network, DiT | FiT | FlexibleTransformer | FlexiDiT):
        return []
    return [module for module in network.modules() if isinstance(module, Block | RotaryBlock)]


def unsharded_twin(denoiser: Denoiser) -> nn.Module:
    """A copy of a network made before it is sharded, on the CPU, without room for the weights that train."""
    network = denoiser.network
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(0, dtype=p.dtype)) for p in network.parameters() if p.requires_grad
    }
    return copy.deepcopy(network, empty)


@torch.no_grad()
def fill(twin: nn.Module, network: nn.Module, values: Mapping[str, Tensor], device: torch.device | None) -> None:
    """Give the twin these values of its trained parameters and the network's buffers. All processes together.

    device: where the twin goes; None: this process helps others and keeps nothing.
    """
    parameters, buffers = dict(twin.named_parameters()), dict(twin.named_buffers())
    for name, value in values.items():
        full = whole(value)
        if device is not None:
            parameters[name].data = full.to(device, copy=True)
    for name, buffer in network.named_buffers():
        buffers[name].copy_(buffer)
    if device is not None:
        twin.to(device)


def drain(twin: nn.Module, names: Iterable[str]) -> None:
    """Back to the CPU, without the values of these parameters."""
    parameters = dict(twin.named_parameters())
    for name in names:
        parameters[name].data = torch.empty(0, dtype=parameters[name].dtype)
    twin.to("cpu")
