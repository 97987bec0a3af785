"""Sites that run on the tokens their routers choose (Infor-Coef, arXiv 2305.12458; sheet E, section 7)."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from pliant.compute.sites import Branch, SiteModel, State
from pliant.compute.subset import put_tokens, take_tokens


class RoutedModel(SiteModel, Protocol):
    """A transformer of one stream seen as sites, with a router at each."""

    def keep_logits(self, s: int, seen: State, context: Any) -> Tensor:
        """(B, N): how much each token deserves site s."""
        ...

    def among(self, s: int, rows: State, seen: State, context: Any) -> Branch:
        """Attention site s for some rows (B, n, D) of its input: their queries, keys and values of all tokens."""
        ...


def routed_output(model: RoutedModel, state: State, context: Any, count: int) -> Tensor:
    """The network's output when `count` tokens of every sample run each site, chosen per site by keep logit."""
    for s, site in enumerate(model.sites):
        seen = model.norm(s, state, context)
        top = model.keep_logits(s, seen, context).topk(count, dim=1).indices.sort(dim=1).values
        rows = (take_tokens(seen[0], top),)
        branch = model.among(s, rows, seen, context) if site.kind == "attention" else model.inner(s, rows, context)
        moved = model.add(s, (take_tokens(state[0], top),), branch, context)
        state = (put_tokens(state[0], moved[0], top),)
    return model.head(state, context)
