"""Rules by the clock: full every so many steps, reuse in between. Sheet E, section 9."""

from __future__ import annotations

import math

from pliant.compute import Reuse
from pliant.compute.sites import format_sites
from pliant.errors import ConfigError
from pliant.plans.caching.options import number, period, whole
from pliant.plans.caching.rows import PLAIN, Row, Target

BRANCHES = Row(write=("branch",))


def fora(target: Target, *, interval: int = 3) -> list[Row]:
    """FORA (arXiv 2407.01425): attention and MLP outputs, before their gates, of the last full step.

    With the descending index j = S-1..0: full at the first step and where `j % interval == 0`, the last step included.
    """
    every = period(interval, target)
    cached = Row(sites=f"C{target.sites}", reuse=Reuse("branch"))
    last = target.steps - 1
    return [BRANCHES if i == 0 or (last - i) % every == 0 else cached for i in range(target.steps)]


def deepcache(target: Target, *, interval: int = 3, blocks: int = 1, center: int | None = None) -> list[Row]:
    """DeepCache (arXiv 2312.00858) for a transformer: the middle's residual is reused, `blocks` at each end always run.

    Full where `i % interval == 0`. center: the non-uniform variant, as many full steps (`steps // interval`) but dense
    around that step, see `crowded`.
    """
    every = period(interval, target)
    whole_steps = {i for i in range(target.steps) if i % every == 0}
    if center is not None:
        whole_steps = set(crowded(target.steps, max(1, target.steps // every), center))
    edge = 2 * whole("blocks", blocks, 0)
    if 2 * edge >= target.sites:
        raise ConfigError(f"blocks is {blocks}: nothing is left between {blocks} front and {blocks} rear blocks")
    first, last = edge, target.sites - edge
    full = Row(write=(f"span({first},{last})",))
    ends = "R" * edge
    cached = Row(sites=format_sites(ends + "C" * (last - first) + ends), reuse=Reuse("span"))
    return [full if i in whole_steps else cached for i in range(target.steps)]


def crowded(steps: int, count: int, center: int) -> list[int]:
    """`count` of `steps` step numbers, the closer together the nearer to `center`; step 0 is always one (DeepCache).

    Interior points of `center + trunc(linspace((-center)^(1/q), (steps - center)^(1/q), count + 1)^q)` with powers that
    keep the sign, q lowered from 1.2 by 0.02 until that many are distinct. Raises ConfigError where none above 1 does.
    """
    at = whole("center", center, 0, steps - 1)
    for k in range(10):
        q = 1.2 - 0.02 * k
        low, high = _signed_power(-at, 1 / q), _signed_power(steps - at, 1 / q)
        points = (low + (high - low) * j / count for j in range(1, count))
        found = sorted({0, *(at + int(_signed_power(p, q)) for p in points)})
        if len(found) == count:
            return found
    raise ConfigError(
        f"center {center} leaves no {count} distinct full steps of {steps}; take another center or a longer interval"
    )


def _signed_power(x: float, q: float) -> float:
    return math.copysign(abs(x) ** q, x)


def delta_dit(target: Target, *, interval: int = 2, cut: int | None = None, blocks: int | None = None) -> list[Row]:
    """Delta-DiT (arXiv 2406.01125): the residual of the rear blocks before step `cut`, of the front blocks from it on.

    cut: by default half the steps; blocks: how many are reused, by default half. Full every `interval` steps, counted
    from the start and from the cut, where the other span begins.
    """
    every = period(interval, target)
    at = target.steps // 2 if cut is None else whole("cut", cut, 0, target.steps)
    reused = 2 * (target.blocks // 2 if blocks is None else whole("blocks", blocks, 1, target.blocks - 1))
    if reused == 0:
        raise ConfigError("a network of one block has no front and rear")
    m = target.sites
    rear, front = (m - reused, m), (0, reused)
    rows = []
    for i in range(target.steps):
        (first, last), age = (rear, i) if i < at else (front, i - at)
        letters = "R" * first + "C" * (last - first) + "R" * (m - last)
        cached = Row(sites=format_sites(letters), reuse=Reuse("span"))
        rows.append(Row(write=(f"span({first},{last})",)) if age % every == 0 else cached)
    return rows


def pab(
    target: Target, *, attention: int = 2, mlp: int | None = None, low: float = 0.1, high: float = 0.8
) -> list[Row]:
    """Pyramid Attention Broadcast (arXiv 2408.12588): each kind of site on its own interval, inside a window of time.

    A kind is reused at step i iff `low < t < high` (house time: timesteps over 1000) and `i % interval != 0`. mlp: None
    runs every MLP.
    """
    every = {"attention": whole("attention", attention), "mlp": whole("mlp", 1 if mlp is None else mlp)}
    low, high = _window(low, high)
    rows = []
    for i, t in enumerate(target.times):
        inside = low < t < high and i > 0
        pair = "".join("C" if inside and i % every[kind] else "R" for kind in ("attention", "mlp"))
        rows.append(_branches(pair * target.blocks, 0))
    return rows


def fastercache(target: Target, *, interval: int = 2, high: float = 0.681) -> list[Row]:
    """FasterCache's attention rule (arXiv 2410.19355): inside t < `high`, attention every `interval` steps only.

    In between it is extrapolated from its two newest outputs; at interval 2 that is `o + 0.5 (o - o2)`, the published
    weight. (Its reuse of the guidance difference is a matter of guidance, not of sites.)
    """
    every = period(interval, target)
    _, high = _window(0.0, high)
    return [
        _branches(("CR" if t < high and i % every else "RR") * target.blocks, 1) for i, t in enumerate(target.times)
    ]


def _branches(letters: str, order: int) -> Row:
    """Sites by letter, all that run are kept."""
    if "C" not in letters:
        return BRANCHES
    return Row(sites=format_sites(letters), reuse=Reuse("branch", order))


def _window(low: float, high: float) -> tuple[float, float]:
    low, high = number("low", low, 0, 1), number("high", high, 0, 1)
    if low >= high:
        raise ConfigError(f"the window from low={low:g} to high={high:g} is empty")
    return low, high


__all__ = ["BRANCHES", "PLAIN", "crowded", "deepcache", "delta_dit", "fastercache", "fora", "pab"]
