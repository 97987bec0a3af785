"""Stores of pairs: what they hold, resuming, sharing the work, and pairs as training data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pliant.compute import Compute
from pliant.distillation.pairs import Wanted, generate_pairs, invert_images
from pliant.errors import ConfigError, DataError
from pliant.plans import sample, uniform
from pliant.plans.noise import seeded_noise
from pliant.training.data import Feed, ImageSet, JoinedPairs, PairSet, TwoSets, is_pair_store
from pliant.training.data.pairs import INDEX, shard_file
from pliant.training.draws import Draws
from support.networks import tiny_denoiser

WANTED = Wanted(10, first_seed=700, shard_size=4)


def images_of(store: PairSet) -> torch.Tensor:
    return store.samples(torch.arange(len(store)), torch.zeros(len(store), dtype=torch.bool), Draws.single(len(store)))


def sources_of(store: PairSet) -> torch.Tensor:
    return store.sources(torch.arange(len(store)), torch.zeros(len(store), dtype=torch.bool), Draws.single(len(store)))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    teacher = tiny_denoiser()
    generate_pairs(tmp_path / "pairs", teacher, uniform(teacher, 3, "heun"), WANTED, batch_size=3)
    return tmp_path / "pairs"


def test_pairs_are_noise_and_what_the_plan_makes_of_it(store: Path) -> None:
    teacher = tiny_denoiser()
    pairs = PairSet(store)
    assert is_pair_store(store) and len(pairs) == 10 and pairs.shape == teacher.sample_shape
    assert pairs.labels.tolist() == [(700 + k) % 3 for k in range(10)]
    noise = torch.stack([seeded_noise(700 + k, -1, teacher.sample_shape) for k in range(10)])
    assert torch.equal(sources_of(pairs), noise)
    made = sample(teacher, uniform(teacher, 3, "heun"), pairs.labels, [700 + k for k in range(10)])
    torch.testing.assert_close(images_of(pairs), made, rtol=1e-5, atol=1e-5)


def test_both_members_are_mirrored(store: Path) -> None:
    pairs = PairSet(store)
    flips = torch.tensor([True, False] * 5)
    images = pairs.samples(torch.arange(10), flips, Draws.single(10))
    noise = pairs.sources(torch.arange(10), flips, Draws.single(10))
    for k in range(10):
        one, other = images_of(pairs)[k], sources_of(pairs)[k]
        assert torch.equal(images[k], one.flip(-1) if flips[k] else one)
        assert torch.equal(noise[k], other.flip(-1) if flips[k] else other)


def test_the_feed_serves_members_that_belong_together(store: Path) -> None:
    pairs = PairSet(store)
    images, noise = images_of(pairs), sources_of(pairs)
    batch = Feed(pairs, seed=3, flip=True).batch(2, range(6), 6)
    assert batch.sources is not None
    for image, source in zip(batch.images, batch.sources, strict=True):
        both = [(a, b) for a, b in zip(images, noise, strict=True)] + [
            (a.flip(-1), b.flip(-1)) for a, b in zip(images, noise, strict=True)
        ]
        assert any(torch.equal(image, a) and torch.equal(source, b) for a, b in both)


KILLED = """
import os, signal, sys
from pathlib import Path
from pliant.compute import Compute
from pliant.distillation.pairs import Wanted, generate_pairs
from pliant.plans import uniform
from pliant.training.data import pairs
from support.networks import tiny_denoiser

write = pairs.save_file
def half(tensors, file):
    write(tensors, file)
    if "pairs-00001" in str(file):
        data = Path(file).read_bytes()
        Path(file).write_bytes(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
pairs.save_file = half
teacher = tiny_denoiser()
generate_pairs(Path(sys.argv[1]), teacher, uniform(teacher, 3, "heun"), Wanted(10, 700, 4), batch_size=3)
"""


def test_a_killed_generation_loses_and_duplicates_nothing(store: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"}
    folder = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder)], env=environment, timeout=120, check=False, stderr=subprocess.PIPE
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert shard_file(folder, 0).is_file() and not shard_file(folder, 1).is_file()
    with pytest.raises(DataError, match="lacks 2 of 3 shards"):
        PairSet(folder)
    before = shard_file(folder, 0).stat().st_mtime_ns
    teacher = tiny_denoiser()
    generate_pairs(folder, teacher, uniform(teacher, 3, "heun"), WANTED, batch_size=10)
    assert shard_file(folder, 0).stat().st_mtime_ns == before  # not made again
    assert not list(folder.glob(".*.tmp"))
    for k in range(3):
        whole, resumed = load_file(shard_file(store, k)), load_file(shard_file(folder, k))
        assert torch.equal(whole["seeds"], resumed["seeds"])
        torch.testing.assert_close(whole["images"], resumed["images"], rtol=1e-5, atol=1e-5)
    assert torch.cat([load_file(shard_file(folder, k))["seeds"] for k in range(3)]).tolist() == list(range(700, 710))


def test_a_damaged_shard_is_made_again(store: Path) -> None:
    file = shard_file(store, 2)
    whole = file.read_bytes()
    file.write_bytes(whole[:40])
    teacher = tiny_denoiser()
    generate_pairs(store, teacher, uniform(teacher, 3, "heun"), WANTED, batch_size=3)
    assert file.read_bytes() == whole


def test_other_pairs_are_refused(store: Path) -> None:
    teacher = tiny_denoiser()
    with pytest.raises(DataError, match="holds other pairs"):
        generate_pairs(store, tiny_denoiser(seed=1), uniform(teacher, 3, "heun"), WANTED)
    with pytest.raises(DataError, match="holds other pairs"):
        generate_pairs(store, teacher, uniform(teacher, 4, "heun"), WANTED)
    with pytest.raises(ConfigError, match="deterministic"):
        generate_pairs(store, teacher, uniform(teacher, 3, {"name": "ddim", "eta": 1.0}), WANTED)
    with pytest.raises(ConfigError, match="count >= 1"):
        Wanted(0)


def test_damaged_index(store: Path) -> None:
    (store / INDEX).write_text("{}")
    with pytest.raises(DataError, match="not the index of a pair store"):
        PairSet(store)


def test_real_images_come_back_from_their_noise(tmp_path: Path) -> None:
    """Inverted with many steps and sampled again: the same images (to 0.02; a random network is stiff in time)."""
    teacher = tiny_denoiser()
    generator = torch.Generator().manual_seed(0)
    data = ImageSet(torch.randn(5, *teacher.sample_shape, generator=generator), torch.arange(5) % 3, ("a", "b", "c"))
    plan = uniform(teacher, 40, "rk4", Compute(precision="fp32"))
    invert_images(tmp_path / "real", teacher, plan, data, shard_size=2, batch_size=2)
    real = PairSet(tmp_path / "real")
    assert torch.equal(images_of(real), data.pixels)
    assert not torch.allclose(sources_of(real), data.pixels, atol=0.1)
    again = sample(teacher, plan, real.labels, [0] * 5, x=sources_of(real))
    assert (again - data.pixels).abs().max() < 0.05 < 0.2 * data.pixels.std()


def test_joined_stores(store: Path, tmp_path: Path) -> None:
    teacher = tiny_denoiser()
    other = tmp_path / "other"
    generate_pairs(other, teacher, uniform(teacher, 2, "euler"), Wanted(5, 50, 5))
    joined = JoinedPairs([PairSet(store), PairSet(other)])
    assert len(joined.labels) == 15
    rows = torch.tensor([12, 3, 10, 9])
    none = torch.zeros(4, dtype=torch.bool)
    found = joined.samples(rows, none, Draws.single(4)), joined.sources(rows, none, Draws.single(4))
    for k, row in enumerate(rows.tolist()):
        part, i = (PairSet(store), row) if row < 10 else (PairSet(other), row - 10)
        assert torch.equal(found[0][k], images_of(part)[i])
        assert torch.equal(found[1][k], sources_of(part)[i])


def test_two_sets_pair_samples_at_random() -> None:
    one = ImageSet(torch.zeros(6, 1, 2, 2), torch.arange(6) % 2, ("a", "b"))
    levels = torch.arange(4.0).reshape(4, 1, 1, 1).expand(-1, 1, 2, 2)
    other = ImageSet(levels, torch.zeros(4, dtype=torch.int64), ("x",))
    feed = Feed(TwoSets(one, other), seed=0)
    first, second = (feed.batch(step, range(6), 6).sources for step in (0, 1))
    assert first is not None and second is not None
    assert set(first.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0} and not torch.equal(first, second)
    again = feed.batch(0, range(6), 6).sources
    assert again is not None and torch.equal(first, again)
    with pytest.raises(DataError, match="opposite"):
        TwoSets(one, ImageSet(torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.int64), ("x",)))
