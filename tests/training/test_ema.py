"""The average in closed form."""

import pytest
import torch
from torch import nn

from pliant.errors import ConfigError, FormatError
from pliant.training.ema import EMA


def parameter(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((3,), value))


def test_constant_decay_in_closed_form() -> None:
    """Parameters p_k = k after update k: average = d^n p_0 + (1-d) sum d^(n-k) k."""
    p = parameter(0.0)
    ema = EMA({"p": p}, decay=0.9, warmup=False)
    for k in range(1, 21):
        p.data.fill_(k)
        ema.update(k - 1)
    exact = 0.1 * sum(0.9 ** (20 - k) * k for k in range(1, 21))
    assert ema.averages["p"].tolist() == pytest.approx([exact] * 3, rel=1e-6)


def test_warmup_follows_its_formula() -> None:
    ema = EMA({"p": parameter(0.0)}, decay=0.5)
    assert [ema.decay_at(k) for k in (0, 1, 2)] == [1 / 10, 2 / 11, 3 / 12]
    assert ema.decay_at(1000) == 0.5


def test_applied_puts_the_averages_in_and_the_own_values_back() -> None:
    p = parameter(1.0)
    ema = EMA({"p": p}, 0.9, warmup=False)
    p.data.fill_(2.0)
    ema.update(0)
    with ema.applied():
        assert p.tolist() == pytest.approx([1.1] * 3)
    assert p.tolist() == [2.0] * 3


def test_low_precision_parameters_are_averaged_in_float32() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    ema = EMA({"p": p}, 0.9999, warmup=False)
    p.data.fill_(2.0)
    ema.update(0)
    assert ema.averages["p"].tolist() == pytest.approx([1.0001] * 2, rel=1e-6)


def test_wrong_decay_and_foreign_states_are_refused() -> None:
    with pytest.raises(ConfigError, match="decay"):
        EMA({"p": parameter(0.0)}, 1.0)
    with pytest.raises(FormatError, match="other"):
        EMA({"p": parameter(0.0)}).load_state_dict({"other": torch.zeros(3)})
