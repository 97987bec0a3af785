"""Clips in and out, and frames through an autoencoder."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pliant import imaging
from pliant.errors import ConfigError, DataError
from pliant.models.autoencoders import decoded, encoded
from pliant.tasks.streaming.clips import check_target, open_clip, open_target

GREY = (1, 8, 8)


def grey(value: int) -> Image.Image:
    return Image.new("L", (8, 8), value)


def values(clip: Any) -> list[int]:
    """The grey level of every frame."""
    return [round((float(frame.mean()) + 1) * 127.5) for frame in clip]


def test_folders_in_natural_order_without_what_is_no_image(tmp_path: Path) -> None:
    for k in (1, 2, 10):
        grey(k).save(tmp_path / f"frame{k}.png")
    (tmp_path / "frame3.png").write_bytes(b"not a picture")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    clip = open_clip(tmp_path, GREY)
    assert clip.total == 4
    assert values(clip) == [1, 2, 10]
    assert clip.unreadable == ["frame3.png"]
    assert values(clip) == [1, 2, 10]  # and again


def test_frames_fit_the_model(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "a.png")
    (frame,) = open_clip(tmp_path, (3, 8, 16))
    assert frame.shape == (3, 8, 16)
    assert frame.dtype == torch.float32
    assert frame[:, 4, 4].tolist() == [1.0, -1.0, -1.0]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".apng"])
def test_animations_there_and_back(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"clip{suffix}"
    clip = [torch.full(GREY, v / 127.5 - 1) for v in (0, 100, 200, 50)]
    with open_target(file, 25.0, None) as target:
        for frame in clip:
            target.show(frame)
        assert not file.exists()
        target.complete({})
    back = open_clip(file, GREY)
    assert back.rate == pytest.approx(25.0)
    assert values(back) == pytest.approx([0, 100, 200, 50], abs=1)
    with Image.open(file) as picture:
        assert picture.size == (64, 64)  # enlarged for people


def test_equal_neighbours_that_were_merged_keep_their_time(tmp_path: Path) -> None:
    file = tmp_path / "clip.gif"
    pictures = [grey(v) for v in (10, 200, 200, 200, 90)]
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=40)
    with Image.open(file) as picture:
        assert picture.n_frames == 3  # type: ignore[attr-defined]
    clip = open_clip(file, GREY)
    assert (values(clip), clip.total, clip.rate) == ([10, 200, 200, 200, 90], 5, pytest.approx(25.0))


def test_folders_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    frame = torch.zeros(GREY)
    with pytest.raises(ZeroDivisionError), open_target(out, 10.0, None) as target:
        target.show(frame)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    for count in (3, 2):  # a second run replaces the first one's frames, all of them
        with open_target(out, 10.0, 2) as target:
            for _ in range(count):
                target.show(frame)
            target.complete({"frames": count})
        assert sorted(f.name for f in out.iterdir()) == [*(f"{k:05d}.png" for k in range(count)), "stream.json"]
        check_target(out, tmp_path / "source")
    pixels, _ = imaging.read_png(out / "00000.png")
    assert pixels.shape == (1, 16, 16)


def test_nothing_of_the_user_is_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    grey(1).save(source / "a.png")
    (tmp_path / "file").write_text("x")
    for out, words in (
        (source, "the input lies in"),
        (tmp_path, "the input lies in"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "x.wmv", "cannot write .wmv"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_target(out, source)
    with pytest.raises(ConfigError, match="holds other files"):
        check_target(source, tmp_path / "clip.gif")
    check_target(tmp_path / "new", source)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.gif").write_bytes(b"GIF89a but no more")
    cases = {"empty": "holds no images", "bad.gif": "neither an image nor a video", "x": "there is no"}
    for name, words in cases.items():
        with pytest.raises(DataError, match=words):
            open_clip(tmp_path / name, GREY)
    (tmp_path / "empty" / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no frame of .* is readable \(1 tried\)"):
        list(open_clip(tmp_path / "empty", GREY))
    with pytest.raises(DataError, match="1 or 3 channels"):
        grey(1).save(tmp_path / "empty" / "b.png")
        list(open_clip(tmp_path / "empty", (4, 8, 8)))


def test_videos_need_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "x.mp4").write_bytes(b"")
    with pytest.raises(DataError, match="pip install av"):
        open_clip(tmp_path / "x.mp4", GREY)
    with pytest.raises(DataError, match="pip install av"):
        check_target(tmp_path / "y.mp4", tmp_path / "x.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 33, 47)])
def test_videos_are_written_and_read_again(tmp_path: Path, suffix: str, shape: tuple[int, int, int]) -> None:
    pytest.importorskip("av")
    file = tmp_path / f"clip{suffix}"
    levels = [-0.9, -0.2, 0.4, 0.9]
    with open_target(file, 12.5, 1) as target:
        for level in levels:
            target.show(torch.full(shape, level))
        target.complete({})
    clip = open_clip(file, shape)
    assert clip.rate == pytest.approx(12.5, rel=1e-3)
    frames = list(clip)
    assert [float(f.mean()) for f in frames] == pytest.approx(levels, abs=0.04), "order and brightness"
    assert all(f.shape == shape for f in frames)


def test_a_video_that_fails_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "clip.mp4").write_bytes(b"old")
    with pytest.raises(DataError, match="no frame was finished"), open_target(tmp_path / "clip.mp4", 10, 1) as target:
        target.complete({})
    assert [f.name for f in tmp_path.iterdir()] == ["clip.mp4"] and (tmp_path / "clip.mp4").read_bytes() == b"old"


def test_videos_through_pyav(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    file = tmp_path / "clip.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width = stream.height = 64
        for value in (20, 120, 220):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64), (value,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = open_clip(file, GREY)
    assert (clip.total, clip.rate) == (3, pytest.approx(12.0))
    assert values(clip) == pytest.approx([20, 120, 220], abs=4)
    file.write_bytes(b"no video")
    with pytest.raises(DataError, match="not a readable video"):
        open_clip(file, GREY)


class Averages(nn.Module):
    """An autoencoder whose latents are block means, like diffusers' in form."""

    def __init__(self, distribution: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.config = SimpleNamespace(scaling_factor=0.5, shift_factor=0.25)
        self.distribution = distribution

    def encode(self, x: Tensor) -> Any:
        z = nn.functional.avg_pool2d(x, 2)
        if self.distribution:
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=z, std=z))
        return SimpleNamespace(latents=z)

    def decode(self, z: Tensor) -> Any:
        return SimpleNamespace(sample=nn.functional.interpolate(z, scale_factor=2))


@pytest.mark.parametrize("distribution", [False, True])
@pytest.mark.parametrize("normalisation", [None, {"shift": [0.1, 0.2, 0.3], "scale": [2.0, 4.0, 8.0]}])
def test_encoding_undoes_decoding(distribution: bool, normalisation: Any) -> None:
    autoencoder = Averages(distribution)
    latents = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = decoded(autoencoder, latents, normalisation)
    torch.testing.assert_close(encoded(autoencoder, images, normalisation), latents)
    if normalisation is None:
        grey = torch.full((1, 3, 8, 8), 0.5)
        assert float(encoded(autoencoder, grey, None).unique()) == pytest.approx((0.5 - 0.25) * 0.5)
