"""Images of different sizes as one tensor of tokens: padded, several to a row if wanted, with masks (sheet B, 1).

Every token carries the place of its patch and the grid of its image. Ids say who attends to whom: 0 is padding, k the
k-th image of the row; a token sees exactly the tokens of its own id. Padding sees padding, so that no softmax is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.errors import ShapeError
from pliant.models.network import Size
from pliant.models.patches import patchify, token_grid, unpatchify
from pliant.models.rope import grid_positions


@dataclass(frozen=True)
class TokenBatch:
    """B rows of L tokens that hold I images."""

    tokens: Tensor
    """(B, L, C * patch area), zero where there is padding."""
    positions: Tensor
    """(B, L, 2) float32 row and column of every token's patch in its image."""
    lengths: Tensor
    """(B, L, 2) float32 rows and columns of every token's image; 1 for padding."""
    ids: Tensor
    """(B, L) int64, 0 is padding."""
    index: Tensor
    """(B, L) int64 which of the I images a token belongs to, in the order given; 0 for padding."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of every image."""
    patch: tuple[int, int]

    @staticmethod
    def padded(images: Sequence[Tensor], patch: tuple[int, int], length: int | None = None) -> TokenBatch:
        """One image (C, H, W) per row, padded to `length` tokens (None: to the longest)."""
        return TokenBatch.packed([[image] for image in images], patch, length)

    @staticmethod
    def packed(rows: Sequence[Sequence[Tensor]], patch: tuple[int, int], length: int | None = None) -> TokenBatch:
        """Several images (C, H, W) per row, one after the other.

        Raises ShapeError for no images, images of different channels, smaller than a patch or not divisible by it,
        and rows longer than `length`.
        """
        if not rows or not all(rows):
            raise ShapeError("a batch of tokens needs at least one image in every row")
        channels = {image.shape[0] if image.ndim == 3 else -1 for row in rows for image in row}
        if len(channels) > 1 or -1 in channels:
            raise ShapeError(f"images of one batch are (C, H, W) with equal C, got channels {sorted(channels)}")
        grids = [[token_grid(_size(image), patch) for image in row] for row in rows]
        if not all(h and w for row in grids for h, w in row):
            raise ShapeError(f"an image of a batch is smaller than the patch {patch[0]}x{patch[1]}")
        longest = max(sum(h * w for h, w in row) for row in grids)
        if length is not None and longest > length:
            raise ShapeError(f"a row of {longest} tokens does not fit the {length} that were asked for")
        first = rows[0][0]
        shape = (len(rows), length or longest)
        tokens = first.new_zeros(*shape, next(iter(channels)) * patch[0] * patch[1])
        positions, lengths = (make(*shape, 2, device=first.device) for make in (torch.zeros, torch.ones))
        ids, index = (torch.zeros(shape, dtype=torch.int64, device=first.device) for _ in range(2))
        count = 0
        for b, row in enumerate(rows):
            start = 0
            for k, image in enumerate(row):
                h, w = grids[b][k]
                here = slice(start, start + h * w)
                tokens[b, here] = patchify(image[None], patch)[0]
                positions[b, here] = grid_positions(torch.arange(h), torch.arange(w)).to(positions)
                lengths[b, here] = torch.tensor([h, w]).to(lengths)
                ids[b, here], index[b, here] = k + 1, count
                start, count = start + h * w, count + 1
        flat = tuple(grid for row in grids for grid in row)
        return TokenBatch(tokens, positions, lengths, ids, index, flat, patch)

    @property
    def single(self) -> bool:
        """Whether every row holds one image."""
        return len(self.grids) == len(self.tokens)

    @property
    def mask(self) -> Tensor | None:
        """(B, 1, L, L) True where the query (first) sees the key; None: everyone sees everyone."""
        if self.single and bool((self.ids == 1).all()):
            return None
        return (self.ids[:, None, :, None] == self.ids[:, None, None, :])

    def images(self, tokens: Tensor) -> list[Tensor]:
        """Output tokens (B, L, patch area * C_out), channel fastest -> the images (C_out, H, W), in the order given."""
        flat, index, real = tokens.flatten(0, 1), self.index.flatten(), self.ids.flatten() > 0
        out = []
        for i, grid in enumerate(self.grids):
            own = flat[real & (index == i)]
            out.append(unpatchify(own[None], grid, self.patch)[0])
        return out


def _size(image: Tensor) -> tuple[int, int]:
    size: Size = tuple(image.shape[1:])
    return size[0], size[1]
