"""A subset of the tokens: which are active, what the others keep, and how their rows are taken and put back.

Region-adaptive sampling (RAS, arXiv 2502.10389; sheet E, section 1). Nothing here knows a network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from pliant.compute.sites import Branch, SiteModel, State
from pliant.compute.tokens import Subset

Sides: TypeAlias = tuple[int, int]
"""Height and width: of a patch in latent pixels."""


class TokenModel(SiteModel, Protocol):
    """A transformer seen as sites whose attention can be asked by some of its tokens, of one stream."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens; token `r * columns + c` is at (r, c)."""
        ...

    def keyed(self, s: int, seen: State, context: Any) -> tuple[Branch, Branch]:
        """`inner` of attention site s, and the keys and values of all tokens."""
        ...

    def attend(self, s: int, seen: State, kept: Branch, active: Tensor, context: Any) -> tuple[Branch, Branch]:
        """Site s for the active tokens (B, n): their queries against kept keys and values, of which their own rows
        are replaced. Also returns the keys and values after that."""
        ...

    def head_rows(self, state: State, active: Tensor, context: Any) -> Tensor:
        """`head` of the active tokens only, (B, C, H, W); zero on the pixels of the others."""
        ...


def token_scores(update: Tensor, patch: Sides, rule: str) -> Tensor:
    """(B, N) one score per token of an update (B, C, H, W): the mean over the token's pixels of the unbiased standard
    deviation over channels ("update_std"), or of the norm over channels ("update_norm").
    """
    wide = update.float()
    pixels = wide.std(1) if rule == "update_std" else wide.square().sum(1).sqrt()
    b, h, w = pixels.shape
    return pixels.view(b, h // patch[0], patch[0], w // patch[1], patch[1]).mean((2, 4)).flatten(1)


def choose(scores: Tensor, drops: Tensor, subset: Subset) -> Tensor:
    """(B, n) int64, ascending: the `n = subset.count(N)` tokens to compute next, of scores and drops (B, N).

    `topk(sign * log(score) + starvation * drops)`: a drop always raises a token's chance. A factor common to all
    scores, such as the length of the step, changes nothing.
    """
    tiny = torch.finfo(torch.float32).tiny
    rank = subset.sign * scores.float().clamp_min(tiny).log() + subset.starvation * drops
    return rank.topk(subset.count(scores.shape[1]), dim=1).indices.sort(dim=1).values


def take_tokens(x: Tensor, active: Tensor) -> Tensor:
    """Rows `active` (B, n) of x (B, N, D) -> (B, n, D).

    Whole rows by their number in the batch: `gather` looks up every element, three to six times slower on a CPU.
    """
    return x.flatten(0, 1).index_select(0, flat_rows(active, x.shape[1])).view(*active.shape, x.shape[2])


def put_tokens(x: Tensor, rows: Tensor, active: Tensor) -> Tensor:
    """x (B, N, D) with `rows` (B, n, D) in the places `active` (B, n); a new tensor."""
    places = flat_rows(active, x.shape[1])
    return x.flatten(0, 1).index_copy(0, places, rows.to(x.dtype).flatten(0, 1)).view(x.shape)


def flat_rows(rows: Tensor, count: int) -> Tensor:
    """(B, n) int64 row numbers of each sample -> (B * n,) row numbers in a batch of `count` rows per sample."""
    first = torch.arange(len(rows), device=rows.device)[:, None] * count
    return (rows + first).flatten()


def pixels_of(active: Tensor, size: Sides, patch: Sides) -> Tensor:
    """(B, 1, H, W) bool: the pixels of the active tokens (B, n), tokens in rows."""
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    mask = torch.zeros(len(active), rows * columns, dtype=torch.bool, device=active.device).scatter(1, active, True)
    mask = mask.view(-1, 1, rows, columns)
    return mask.repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)


@dataclass
class Regions:
    """What one request remembers of its tokens. Rows are samples; all streams of guidance share the active ones."""

    active: Tensor | None = None
    """(B, n) int64, ascending: the tokens of the next call that asks for a subset. None: all of them."""
    patch: Sides = (1, 1)
    """Of the tokens that `active` counts."""
    drops: dict[Sides, Tensor] = field(default_factory=dict)
    """By patch: (B, N) how often each token was left out so far. Never set back."""
    last: dict[str, Tensor] = field(default_factory=dict)
    """By name: the newest prediction of every pixel, (B, C, H, W)."""

    def complete(self, name: str, value: Tensor, partial: bool) -> Tensor:
        """The prediction with what was not computed now as it was the last time, and remember it.

        name: whose prediction ("cond", "guided", ...); partial: whether only the active tokens were computed.
        """
        if partial and self.active is not None:
            computed = pixels_of(self.active, (value.shape[2], value.shape[3]), self.patch)
            value = torch.where(computed, value, self.last[name].to(value.dtype))
        self.last[name] = value
        return value

    def choose(self, prediction: Tensor, subset: Subset, patch: Sides) -> None:
        """Choose the tokens of the next call from the newest (guided) prediction (B, C, H, W), and count the others."""
        self.patch = patch
        tokens = (prediction.shape[2] // patch[0]) * (prediction.shape[3] // patch[1])
        if subset.count(tokens) == tokens:
            self.active = None
            return
        scores = token_scores(prediction, patch, subset.rule)
        drops = self.drops.get(patch, torch.zeros_like(scores))
        self.active = choose(scores, drops, subset)
        self.drops[patch] = drops + 1 - torch.zeros_like(drops).scatter(1, self.active, 1.0)


Read: TypeAlias = Callable[[int], Branch]
Write: TypeAlias = Callable[[int, Branch], None]


def subset_output(
    model: TokenModel, state: State, context: Any, active: Tensor, read: Read, write: Write
) -> Tensor:
    """The network's output on the active tokens (B, n), zero elsewhere.

    state: all tokens, embedded. read, write: keys and values of a site, which all tokens' attention sees.
    """
    state = tuple(take_tokens(tokens, active) for tokens in state)
    for s, site in enumerate(model.sites):
        seen = model.norm(s, state, context)
        if site.kind == "attention":
            branch, kept = model.attend(s, seen, read(s), active, context)
            write(s, kept)
        else:
            branch = model.inner(s, seen, context)
        state = model.add(s, state, branch, context)
    return model.head_rows(state, active, context)
