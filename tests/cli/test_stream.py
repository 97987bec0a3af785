"""`pliant stream`: files in, files out, numbers that add up, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import pliant
from pliant import imaging
from pliant.tasks.streaming import Stream, StreamGuidance, even_levels, levels_plan, process
from pliant.tasks.streaming.clips import open_clip
from support.cli import Run, refused


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine frames, every one three times in a row, and one damaged file."""
    folder = tmp_path_factory.mktemp("stream") / "frames"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for k in range(9):
        if k % 3 == 0:
            pixels = torch.randint(0, 256, (1, 8, 8), generator=generator, dtype=torch.uint8)
        (folder / f"f{k}.png").write_bytes(imaging.encode_png(pixels))
    (folder / "f4b.png").write_bytes(b"damaged")
    return folder


def test_a_folder_of_frames(plain: Path, frames: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    options = ("--class", "zebra", "--strength", 0.5, "--steps", 2, "--guidance", "self", "--scale", 1.5, "--seed", 3)
    done = run("stream", plain, frames, "-o", out, *options, "--json")
    assert done.code == 0
    assert done.err == "skipped f4b.png: not readable\n"
    report = done.json
    assert json.loads((out / "stream.json").read_text()) == report
    assert (report["frames"], report["processed"], report["skipped"], report["shown"]) == (9, 9, 0, 9)
    assert (report["network_calls"], report["rows"], report["rows_per_call"]) == (10, 18, 2)
    assert report["unreadable"] == ["f4b.png"]
    assert report["levels"] == [0.5, 0.25]
    assert report["fps"] == pytest.approx(9 / report["seconds"])
    assert report["latency_calls"] == 2
    assert report["latency_ms"]["mean"] > 0
    # The same from Python, pixel by pixel.
    model = pliant.load(plain)
    stream = Stream(model, levels_plan(model, even_levels(0.5, 2)), 2, StreamGuidance("self", 1.5), seed=3)
    wanted = [imaging.to_pixels(frame) for frame in process(stream, open_clip(frames, (1, 8, 8)))]
    assert [torch.equal(imaging.read_png(out / f"{k:05d}.png")[0], w) for k, w in enumerate(wanted)] == [True] * 9


def test_the_filter_saves_calls(plain: Path, frames: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "out.gif"
    report = run("stream", plain, frames, "-o", file, "--filter", 0.98, "--json").json
    assert (report["frames"], report["processed"], report["skipped"], report["shown"]) == (9, 3, 6, 9)
    assert report["network_calls"] == 3 + 3
    clip = open_clip(file, (1, 64, 64))
    assert clip.total == 3  # the writer joins equal frames, and each lasts three times as long
    assert clip.rate == pytest.approx(10 / 3, rel=0.02)


@pytest.mark.parametrize("guidance", ["none", "onetime", "full"])
def test_text_report(guidance: str, plain: Path, frames: Path, tmp_path: Path, run: Run) -> None:
    done = run("stream", plain, frames, "-o", tmp_path / "x.webp", "--guidance", guidance)
    assert done.code == 0
    first, second = done.out.splitlines()
    assert "9 frames, 1 unreadable; " in first
    assert "frames per second" in first
    rows = {"none": 4, "onetime": 5, "full": 8}[guidance]
    assert f"12 network calls of up to {rows} rows" in second


def test_live_frames_are_dropped_or_shown(plain: Path, frames: Path, tmp_path: Path, run: Run) -> None:
    done = run("stream", plain, frames, "-o", tmp_path / "out", "--live", 200, "--json")
    assert done.code == 0
    report = done.json
    assert report["frames"] + report["dropped_frames"] == 9
    assert report["shown"] + report["dropped_outputs"] == report["processed"]
    assert len(list((tmp_path / "out").glob("*.png"))) == report["shown"]


def test_a_plan_decides_everything(plain: Path, frames: Path, tmp_path: Path, run: Run) -> None:
    plan = tmp_path / "plan.json"
    model = pliant.load(plain)
    levels_plan(model, [0.7, 0.2], "euler").save(plan)
    report = run("stream", plain, frames, "-o", tmp_path / "a.gif", "--plan", plan, "--json").json
    assert (report["levels"], report["solver"]) == ([0.7, 0.2], "euler")
    refused(run("stream", plain, frames, "-o", tmp_path / "b.gif", "--plan", plan, "--steps", 2), "--steps", "--plan")


def test_latents_go_through_an_autoencoder(latent: Path, tmp_path: Path, run: Run) -> None:
    from diffusers import AutoencoderTiny

    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    autoencoder.save_pretrained(tmp_path / "ae")
    folder = tmp_path / "in"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (20, 30), (80 * k, 0, 0)).save(folder / f"{k}.png")
    refused(run("stream", latent, folder, "-o", tmp_path / "out"), "4 channels", "--autoencoder")
    done = run("stream", latent, folder, "-o", tmp_path / "out", "--autoencoder", tmp_path / "ae")
    assert done.code == 0, done.err
    with Image.open(tmp_path / "out" / "00002.png") as picture:
        assert (picture.size, picture.mode) == ((16, 16), "RGB")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--filter", 1.5], ["between 0 and 1", "1.5"]),
        (["--filter", "nan"], ["between 0 and 1"]),
        (["--max-skip", 3], ["--filter"]),
        (["--levels", "0.3,0.6"], ["must decrease", "0.6 follows 0.3"]),
        (["--levels", "0.6,x"], ["0.6,x"]),
        (["--levels", "0.6", "--steps", 2], ["--levels", "--steps"]),
        (["--strength", 0], ["strength", "0"]),
        (["--strength", 1.5], ["strength"]),
        (["--steps", 0], ["--steps"]),
        (["--class", 7], ["class 7", "0 to 2"]),
        (["--class", "tigr"], ["tigr"]),
        (["--guidance", "slef"], ["self"]),
        (["--scale", 2], ["--guidance"]),
        (["--guidance", "full", "--delta", 0.5], ["delta"]),
        (["--solver", "dpmpp-2m"], ["step 1", "cannot be pipelined"]),
        (["--solver", "dimm"], ["ddim"]),
        (["--live", 0], ["--live"]),
        (["--fps", -1], ["--fps"]),
        (["-o", "out.wmv"], [".wmv", ".mp4"]),
    ],
)
def test_bad_options_are_one_line(options: list[object], words: list[str], plain: Path, frames: Path, run: Run) -> None:
    refused(run("stream", plain, frames, *options), *words)


def test_bad_input_is_one_line_and_leaves_nothing(plain: Path, frames: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.png").write_bytes(b"x")
    out = tmp_path / "out"
    refused(run("stream", plain, tmp_path / "empty", "-o", out), "no images")
    refused(run("stream", plain, tmp_path / "nowhere", "-o", out), "no file or folder")
    refused(run("stream", plain, tmp_path / "damaged", "-o", out), "readable", "1 tried")
    refused(run("stream", plain, frames, "-o", frames), "the input lies in")
    refused(run("stream", plain, frames, "-o", frames.parent), "the input lies in")
    refused(run("stream", "no-model", frames, "-o", out), "no-model")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["damaged", "empty"]
