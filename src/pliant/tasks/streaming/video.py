"""Video containers: frames in and out through PyAV (FFmpeg), which belongs to the extra `video`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pliant.errors import DataError

READ = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
WRITTEN = {".mp4": ("mp4", "libx264"), ".mov": ("mov", "libx264"), ".mkv": ("matroska", "libx264"),
           ".webm": ("webm", "libvpx-vp9")}  # fmt: skip
"""Suffix -> (container, encoder)."""
QUALITY = {"libx264": {"crf": "17"}, "libvpx-vp9": {"crf": "20", "b:v": "0"}}
"""Constant quality, near the eye's limit."""


def pyav(what: str) -> Any:
    """The module. what: what needs it, for the message. Raises DataError where it is not installed."""
    try:
        return importlib.import_module("av")
    except ImportError:
        raise DataError(
            f"{what} needs PyAV: pip install av; or use a folder of images, a GIF, an animated WebP or PNG"
        ) from None


def describe(file: Path) -> tuple[int | None, float | None]:
    """(frames, frames per second), each None where the container does not say. Raises DataError."""
    av = pyav(f"{file} is a video, and reading videos")
    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            return int(stream.frames) or None, float(stream.average_rate or 0.0) or None
    except Exception as error:
        raise DataError(f"{file} is not a readable video ({' '.join(str(error).split())})") from None


def pictures(file: Path) -> Iterator[tuple[str, Any]]:
    """(name, PIL image or the exception that reading it raised), one after the other."""
    with pyav("reading videos").open(str(file)) as container:
        frames = container.decode(video=0)
        for k in range(10**9):
            try:
                frame: Any = next(frames).to_image()
            except StopIteration:
                return
            except Exception as error:  # a decoder does not find its way back into a damaged stream
                yield f"frame {k} and what follows", error
                return
            yield f"frame {k}", frame


class VideoWriter:
    """Encodes frames as they come. Made by `open_video`."""

    def __init__(self, container: Any, encoder: str, rate: float) -> None:
        self.container = container
        exact = Fraction(rate).limit_denominator(1001)
        self.stream = container.add_stream(encoder, rate=exact, options=QUALITY[encoder])
        self.stream.pix_fmt = "yuv420p"  # what every player shows
        self.frames = 0

    def write(self, pixels: Tensor) -> None:
        """pixels (1 or 3, H, W) uint8; an odd side gets one more row or column, as the format wants even ones."""
        av = pyav("writing videos")
        height, width = pixels.shape[1:]
        padded = nn.functional.pad(pixels[None].float(), (0, width % 2, 0, height % 2), mode="replicate")[0]
        picture = padded.byte().expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        if not self.frames:
            self.stream.height, self.stream.width = picture.shape[:2]
        self.frames += 1
        for packet in self.stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
            self.container.mux(packet)

    def finish(self) -> None:
        """What the encoder still holds."""
        for packet in self.stream.encode():
            self.container.mux(packet)


@contextmanager
def open_video(file: Path, suffix: str, rate: float) -> Iterator[VideoWriter]:
    """A video file at `rate` frames per second whose container and encoder follow from the suffix.

    Raises DataError if this FFmpeg lacks the encoder.
    """
    av = pyav(f"writing {suffix} files")
    container, encoder = WRITTEN[suffix]
    try:
        av.codec.Codec(encoder, "w")
    except Exception:
        raise DataError(f"{suffix} files need the encoder {encoder}, which the installed PyAV does not have") from None
    with av.open(str(file), "w", format=container) as target:
        yield VideoWriter(target, encoder, rate)
