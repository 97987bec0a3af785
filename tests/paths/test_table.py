"""Paths given by a table of noise levels."""

import json

import pytest
import torch

from pliant.errors import ConfigError
from pliant.paths import get_path, path_from_config
from pliant.paths.table import VPTable

KNOWN = get_path("vp-discrete", betas="scaled-linear", num_timesteps=200)
SAME = VPTable(tuple(KNOWN.alphas_cumprod.tolist()))
DARK = VPTable((0.9, 0.6, 0.3, 0.0))


def test_equals_the_named_table():
    t = torch.linspace(0.0, 1.0, 401, dtype=torch.float64)
    for ours, theirs in zip(SAME.alpha_sigma(t[1:]), KNOWN.alpha_sigma(t[1:]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert SAME.alpha_sigma(0.0)[:2] == KNOWN.alpha_sigma(0.0)[:2]


@pytest.mark.parametrize("path", [SAME, DARK])
def test_derivatives(path):
    t, h = torch.tensor([0.131, 0.372, 0.611, 0.833, 0.973], dtype=torch.float64), 1e-6
    s, up, down = (path.alpha_sigma(v) for v in (t, t + h, t - h))
    torch.testing.assert_close(s.dalpha, (up.alpha - down.alpha) / (2 * h), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(s.dsigma, (up.sigma - down.sigma) / (2 * h), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(s.alpha**2 + s.sigma**2, torch.ones_like(t))


@pytest.mark.parametrize("path", [SAME, DARK])
def test_log_snr_inverse(path):
    t = torch.linspace(0.02, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(path.time_of_log_snr(path.log_snr(t)), t, rtol=1e-9, atol=1e-9)


def test_zero_terminal_snr_is_exact():
    s = DARK.alpha_sigma(torch.tensor([0.25, 1.0]))
    assert s.alpha.tolist() == [pytest.approx(0.9**0.5), 0.0] and float(s.sigma[1]) == 1.0
    assert bool(torch.isfinite(s.dsigma).all())


def test_config_round_trip():
    assert path_from_config(json.loads(json.dumps(DARK.to_config()))) == DARK


@pytest.mark.parametrize("table", [(), (0.5, 0.6), (1.0, 0.5), (0.5, -0.1)])
def test_bad_tables(table):
    with pytest.raises(ConfigError, match="fall strictly"):
        VPTable(table)
