"""Small models in folders, and the command line as a fixture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pliant
from pliant.paths import NetworkTime
from support.cli import Run, run_here
from support.networks import randomize, tiny_denoiser

NAMES = ["tabby, tabby cat", "golden retriever", "zebra"]


@pytest.fixture(scope="session")
def run() -> Run:
    return run_here


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DiT of 8x8 grey images, patch 2, three named classes."""
    denoiser = tiny_denoiser(in_channels=1)
    folder = tmp_path_factory.mktemp("models") / "plain"
    pliant.save(replace(denoiser, metadata={"name": "plain", "class_names": NAMES}), folder)
    return folder


@pytest.fixture(scope="session")
def flexible(plain: Path) -> Path:
    """The same with patch 4, every tensor random again."""
    denoiser = pliant.flexify(pliant.load(plain), [4], rank=4)
    randomize(denoiser.network, seed=5)
    folder = plain.with_name("flexible")
    pliant.save(denoiser, folder)
    return folder


@pytest.fixture(scope="session")
def latent(plain: Path) -> Path:
    """A random model of 4-channel latents."""
    folder = plain.with_name("latent")
    pliant.save(tiny_denoiser(in_channels=4), folder)
    return folder


@pytest.fixture(scope="session")
def ddpm(plain: Path) -> Path:
    """A model with the conventions of official DiT."""
    denoiser = tiny_denoiser(path="vp-discrete", prediction="epsilon", in_channels=4, learn_sigma=True)
    time = NetworkTime.timesteps(1000)
    folder = plain.with_name("ddpm")
    pliant.save(replace(denoiser, network_time=time), folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
