"""Randomness is a function of (seed, step, row): not of the process that computes the row."""

import torch
from torch import Tensor

from pliant.paths import get_path
from pliant.training.draws import Draws


def everything(draws: Draws) -> list[Tensor]:
    return [draws.uniform(), draws.normal((2, 3)), draws.integers(1000), draws.normal((2, 3))]


def test_rows_do_not_depend_on_who_computes_them() -> None:
    whole = everything(Draws(5, 7, range(8), 8))
    parts = [everything(Draws(5, 7, rows, 8)) for rows in ([0, 1, 2], [3], [4, 5, 6, 7])]
    for i, tensor in enumerate(whole):
        assert torch.equal(tensor, torch.cat([part[i] for part in parts]))


def test_shared_choices_are_equal_everywhere() -> None:
    a, b = Draws(5, 7, [0, 1], 8), Draws(5, 7, [6, 7], 8)
    assert torch.equal(torch.rand(4, generator=a.shared()), torch.rand(4, generator=b.shared()))


def test_seed_step_call_and_row_all_matter() -> None:
    first = Draws(0, 0, range(4)).normal((64,))
    draws = Draws(0, 0, range(4))
    draws.normal((64,))
    for other in (Draws(1, 0, range(4)).normal((64,)), Draws(0, 1, range(4)).normal((64,)), draws.normal((64,))):
        assert not torch.equal(first, other)
    assert len({float(row[0]) for row in first}) == 4


def test_laws() -> None:
    draws = Draws.single(4000, seed=2)
    noise, u = draws.normal((8,)), draws.uniform()
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    assert abs(float(u.mean()) - 0.5) < 0.02
    # Independent rows: the covariance of neighbours is zero up to 5 standard errors.
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 5 / (4000 * 8) ** 0.5


def test_noise_of_gaussian_paths_is_normal_noise() -> None:
    """Bit-equal, so that training runs repeat; and only the path's own law differs from it."""
    for shape in ((3,), (3, 8, 8)):
        normal = Draws(5, 7, range(4)).normal(shape)
        assert torch.equal(Draws(5, 7, range(4)).noise(get_path("linear"), shape), normal)
        # Each row of PFGM++'s noise is Gaussian noise with a length of its own, the same whoever computes it.
        other = Draws(5, 7, range(4)).noise(get_path("pfgmpp", dimensions=4), shape)
        assert torch.equal(Draws(5, 7, [2, 3]).noise(get_path("pfgmpp", dimensions=4), shape), other[2:])
        assert not torch.allclose(other, normal)
