"""Training on samples of any size: packs that fill a token budget, the packed objective, whole runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pliant
from pliant.errors import ConfigError, DataError, ShapeError
from pliant.models.network import Size
from pliant.paths import get_path
from pliant.training import TrainConfig, parse_config, train
from pliant.training.data import Packs, TokenFeed
from pliant.training.draws import Draws
from pliant.training.objectives.any_size import AnySizeFlow, shift_by_size
from pliant.training.objectives.base import SizedBatch
from pliant.training.setup import build_denoiser, build_objective

SIZES: tuple[Size, ...] = ((4, 4), (6, 4), (4, 6), (8, 2))


class Shapes:
    """A set of samples of four sizes; sample k is k everywhere, but for its last column, which is -k."""

    def __init__(self, count: int = 40, channels: int = 2) -> None:
        kinds = torch.randint(len(SIZES), (count,), generator=torch.Generator().manual_seed(1))
        self.sizes = torch.tensor(SIZES)[kinds]
        self.labels = kinds % 3
        self.class_names = ("a", "b", "c")
        self.channels = channels

    def samples(self, indices: Tensor, flips: Tensor, draws: Draws) -> Tensor:
        size = self.sizes[indices].unique(dim=0)
        assert len(size) == 1, "samples of several sizes"
        x = indices.float()[:, None, None, None].expand(-1, self.channels, *size[0].tolist()) / 20 - 1
        x = torch.cat([x[..., :-1], -x[..., -1:]], dim=-1)
        return torch.where(flips[:, None, None, None], x.flip(-1), x)


def config(output: Path, **changes: Any) -> TrainConfig:
    tree = {
        "model": {"flexible": {"input_size": [4, 4], "in_channels": 2, "width": 32, "depth": 2, "heads": 2,
                               "num_classes": 3, "rope_theta": 100, "train_sides": [2, 8], "train_pixels": [16, 24]}},
        "objective": {"name": "any_size"},
        "data": {"source": "nowhere", "flip": True},
        "optimizer": {"lr": 3e-3},
        "steps": 6,
        "tokens": 90,
        "seed": 3,
        "log_every": 2,
        "checkpoint": {"every": 3, "keep": 2},
        "output": str(output),
    }  # fmt: skip
    return parse_config({**tree, **changes})


def test_packs_fill_the_budget_and_show_every_sample_once_per_epoch() -> None:
    data = Shapes(200)
    tokens = data.sizes.prod(1)
    packs = Packs(data.sizes, tokens, 100, seed=5)
    seen: list[int] = []
    fills, kinds, count = [], [], 0
    while len(seen) < 400:
        members = packs.members(count)
        fills.append(int(tokens[members].sum()))
        kinds.append(len(data.sizes[members].unique(dim=0)))
        assert len(members) <= packs.most and len(torch.unique_consecutive(packs.kinds[members])) == kinds[-1]
        seen += members
        count += 1
    assert sorted(seen[:200]) == list(range(200)) and sorted(seen[200:400]) == list(range(200))
    assert seen[:200] != seen[200:400]
    assert max(fills) <= 100 and sum(fills) / len(fills) > 80
    assert sum(kinds) / len(kinds) < 2.2  # of four
    again = Packs(data.sizes, tokens, 100, seed=5)
    assert again.members(count - 1) == packs.members(count - 1)  # whatever was asked before
    assert again.members(0) == packs.members(0)
    assert Packs(data.sizes, tokens, 100, seed=6).members(0) != packs.members(0)


def test_budgets_and_sizes_that_cannot_be() -> None:
    data = Shapes()
    with pytest.raises(DataError, match="24 tokens, more than the budget of 20"):
        TokenFeed(data, (1, 1), 20, seed=0)
    with pytest.raises(ShapeError, match="does not divide"):
        TokenFeed(data, (4, 4), 100, seed=0)
    with pytest.raises(ConfigError, match="at least 1"):
        TokenFeed(data, (1, 1), 0, seed=0)
    empty = Shapes(0)
    with pytest.raises(DataError, match="empty"):
        TokenFeed(empty, (1, 1), 10, seed=0)


def test_feed_serves_groups_with_their_labels_and_mirrors() -> None:
    data = Shapes()
    feed = TokenFeed(data, (2, 2), 30, seed=2, flip=True)
    flipped = 0
    for step in range(4):
        batch = feed.batch(step, 1, 2)
        members = feed.packs.members(2 * step + 1)
        rows = feed.rows(step, 1, 2)
        assert len(rows) == len(batch) == len(members) and rows.start == feed.packs.most
        assert batch.labels.tolist() == data.labels[members].tolist()
        assert batch.pixels.tolist() == data.sizes[members].prod(1).tolist()
        first, last = (torch.cat([x[:, 0, 0, at] for x in batch.groups]) for at in (0, -1))
        value = torch.tensor(members) / 20 - 1
        mirrored = (first - value).abs() > 1e-6
        torch.testing.assert_close(torch.where(mirrored, last, first), value)
        flipped += int(mirrored.sum())
        assert torch.equal(torch.cat([x.flatten() for x in batch.groups]),
                           torch.cat([x.flatten() for x in feed.batch(step, 1, 2).groups]))  # fmt: skip
    assert 2 < flipped < 28


def test_shift_by_size_is_the_resolution_shift() -> None:
    """SD3, eq. 23: at four times the pixels, sqrt(m/n) = 2: t -> 2t / (1 + t); inverse below; none at the reference."""
    t = torch.tensor([0.5, 0.5, 0.5, 0.0])
    shifted = shift_by_size(t, torch.tensor([400, 100, 25, 400]), 100)
    torch.testing.assert_close(shifted, torch.tensor([2 / 3, 0.5, 1 / 3, 0.0]))


def test_loss_is_the_mean_over_samples_of_their_own_means() -> None:
    """On a network that answers 0 the loss is E (noise - data)^2: of every sample, big or small, the same weight."""
    denoiser = build_denoiser(config(Path("unused")))
    groups = (torch.zeros(2, 2, 8, 2), torch.full((1, 2, 4, 4), 3.0))
    batch = SizedBatch(groups, torch.tensor([0, 1, 2]))
    result = AnySizeFlow(class_dropout=0.0)(denoiser, batch, Draws.single(3))
    draws = Draws.single(3)
    draws.shared(), draws.each(AnySizeFlow().time.sample), draws.uniform()
    noise = draws.noises(denoiser.path, [(2, 8, 2), (2, 8, 2), (2, 4, 4)])
    wanted = sum(float((n - x).square().mean()) for n, x in zip(noise, [0.0, 0.0, 3.0], strict=True)) / 3
    assert float(result.loss.detach()) == pytest.approx(wanted, rel=1e-5)
    equal = Draws.single(2).noises(get_path("linear"), [(2, 3), (2, 3)])
    assert torch.equal(torch.stack(equal), Draws.single(2).noise(get_path("linear"), (2, 3)))


def test_patch_sizes_are_drawn_as_asked() -> None:
    objective = AnySizeFlow(patches=(0.25, 0.75))
    drawn = [objective.choose(((1, 1), (2, 2)), Draws.single(1, step=step)) for step in range(400)]
    assert 0.68 < sum(p == (2, 2) for p in drawn) / 400 < 0.82


def test_training_learns_resumes_exactly_and_samples_any_size(tmp_path: Path) -> None:
    data = Shapes()
    whole = train(config(tmp_path / "whole", steps=40, checkpoint={"every": 20}), data=data, quiet=True)
    part = config(tmp_path / "part", steps=20, checkpoint={"every": 20})
    train(part, data=data, quiet=True)
    resumed = config(tmp_path / "part", steps=40, checkpoint={"every": 20}, resume="latest")
    again = train(resumed, data=data, quiet=True)
    for a, b in zip(whole.denoiser.parameters(), again.denoiser.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.loss < 1.05  # 1 + the data's mean square (0.35) at the start
    model = pliant.load(whole.model_folder)
    assert model.class_names == ["a", "b", "c"]
    plan = pliant.Plan.weak_to_powerful(model, 4, "60%", solver="euler")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # sizes of the training data draw none
        for size in SIZES:
            assert pliant.sample(model, plan, [0, 1], size=size).shape == (2, 2, *size)


def test_checkpointing_changes_no_weight(tmp_path: Path) -> None:
    data = Shapes()
    plain = train(config(tmp_path / "plain", steps=3), data=data, quiet=True).denoiser
    saving = train(config(tmp_path / "saving", steps=3, checkpointing=True), data=data, quiet=True).denoiser
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a, b)
    tree = {"model": {"dit": {"input_size": [8, 8], "in_channels": 1, "width": 16, "depth": 1, "heads": 2,
                              "num_classes": 10}}, "objective": {"name": "flow_matching"}, "tokens": None,
            "batch_size": 4, "data": {"source": "digits", "limit": 8}, "checkpointing": True}  # fmt: skip
    with pytest.raises(ConfigError, match="for flexible networks and FiT"):
        train(config(tmp_path / "dit", **tree), quiet=True)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    data = Shapes(channels=3)
    with pytest.raises(DataError, match="3 channels, the model takes 2"):
        train(config(tmp_path), data=data, quiet=True)
    tree = config(tmp_path).to_dict()
    narrow = {"flexible": {**tree["model"]["flexible"], "train_sides": [4, 8]}}
    with pytest.raises(DataError, match="size 8x2, the model says that it trains on sides of 4 to 8"):
        train(config(tmp_path, model=narrow), data=Shapes(), quiet=True)
    fewer = {"flexible": {**tree["model"]["flexible"], "num_classes": 2}}
    with pytest.raises(DataError, match=r"set model\.flexible\.num_classes to at least 3"):
        train(config(tmp_path, model=fewer), data=Shapes(), quiet=True)
    for changes, words in (
        ({"tokens": None}, "needs `tokens`"),
        ({"batch_size": 8}, "needs `tokens`, and not `batch_size`"),
        ({"objective": {"name": "flow_matching"}}, "needs `batch_size`"),
        ({"model": {**tree["model"], "dit": {}}}, "give one of `dit`, `flexible`"),
    ):
        with pytest.raises(ConfigError, match=words):
            config(tmp_path, **changes)
    with pytest.raises(ConfigError, match="trains networks for any size"):
        dit = config(tmp_path, model={"dit": {"input_size": [4, 4], "width": 16, "depth": 1, "heads": 2}})
        build_objective(dit, build_denoiser(dit))
    with pytest.raises(ConfigError, match="each of 2 patch sizes"):
        wrong = config(tmp_path, objective={"name": "any_size", "patches": [1.0]})
        build_objective(wrong, build_denoiser(wrong))
