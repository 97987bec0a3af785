"""FiTv2's cheap training on larger images: only what depends on size, and what shifts (arXiv 2410.13925, section 3.4).

The official rule names parameters by parts of their names (`x_embedder`, `bias`, `LN`, `final_layer`); these are the
same ones: patch embeddings and heads, all of adaLN, and every bias. 14.15 % of FiTv2-XL.
"""

from __future__ import annotations

from torch import nn

PARTS = ("patch_embed", "modes", "modulation", "head")
"""Modules that train whole, by the first part of their parameters' names."""


def trains_on_resolution(name: str) -> bool:
    """Whether the parameter of this name trains."""
    return name.split(".")[0] in PARTS or name.rsplit(".", 1)[-1].endswith("bias")


def freeze_for_resolution(network: nn.Module) -> None:
    """Leave only these parameters trainable. The weights stay: the official code resets those that train to their
    initialisation, which the paper does not say (sheet B, section 1)."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(trains_on_resolution(name))
