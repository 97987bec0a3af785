"""Clips: frames from a folder, an animation or a video, and finished frames back into one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pliant import imaging
from pliant.errors import ConfigError, DataError
from pliant.files import replaced_file, replaced_folder, write_json
from pliant.tasks.streaming import video
from pliant.training.data.decode import normalise, to_pixels

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".apng")
ANIMATIONS = {".gif": "GIF", ".webp": "WEBP", ".apng": "PNG"}
REPORT = "stream.json"
"""Beside the frames of a written folder; what marks it as one that may be replaced."""
DEFAULT_RATE = 10.0
LONGEST = 1000
"""Times that one frame of an animation is repeated at most to keep its tempo."""


@dataclass
class Clip:
    """Frames to read, lazily: (C, H, W) float32 in [-1, 1], centre-cropped to the model's size."""

    name: str
    total: int | None
    """How many frames there are, if that is known before reading."""
    rate: float | None
    """Frames per second that the file was made for; None: it does not say."""
    _pictures: Callable[[], Iterator[tuple[str, Any]]] = field(repr=False)
    """Yields (name, PIL image or the exception that reading it raised)."""
    _shape: tuple[int, int, int] = field(repr=False)
    unreadable: list[str] = field(default_factory=list)
    """Names of the frames that could not be read; grows while reading."""

    def __iter__(self) -> Iterator[Tensor]:
        """Raises DataError at the end if no frame at all was readable."""
        self.unreadable.clear()
        channels, height, width = self._shape
        read = 0
        for name, picture in self._pictures():
            try:
                if isinstance(picture, Exception):
                    raise picture
                pixels = to_pixels(picture, channels, (height, width))
            except DataError:
                raise
            except Exception:  # PIL and its codecs raise anything from OSError to struct.error on damaged files
                self.unreadable.append(name)
                continue
            read += 1
            yield normalise(pixels)
        if not read:
            raise DataError(f"no frame of {self.name} is readable ({len(self.unreadable)} tried)")


def open_clip(source: Path, shape: tuple[int, int, int]) -> Clip:
    """A folder of images (in natural order of names), an animated or still image, or a video. shape: (C, H, W) wanted.

    Raises DataError, in one line, for what is missing, empty or of a kind that cannot be read here.
    """
    if source.is_dir():
        return _folder(source, shape)
    if not source.exists():
        raise DataError(f"there is no file or folder {source}")
    return _video(source, shape) if source.suffix.lower() in video.READ else _animation(source, shape)


def _natural(file: Path) -> list[Any]:
    """frame2 before frame10."""
    parts = re.split(r"(\d+)", file.name.lower())
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p]


def _folder(folder: Path, shape: tuple[int, int, int]) -> Clip:
    files = [f for f in folder.iterdir() if f.suffix.lower() in IMAGES and not f.name.startswith(".") and f.is_file()]
    if not files:
        raise DataError(f"the folder {folder} holds no images ({', '.join(IMAGES[:5])}, ...)")
    files.sort(key=_natural)

    def pictures() -> Iterator[tuple[str, Any]]:
        from PIL import Image

        for file in files:
            try:
                with Image.open(file) as picture:
                    picture.load()
                    yield file.name, picture
            except Exception as error:
                yield file.name, error

    return Clip(str(folder), len(files), None, pictures, shape)


def _animation(file: Path, shape: tuple[int, int, int]) -> Clip:
    from PIL import Image

    try:
        with Image.open(file) as picture:
            durations = []
            for k in range(int(getattr(picture, "n_frames", 1))):
                with suppress(Exception):  # a damaged frame is named when it is read
                    picture.seek(k)
                    picture.load()  # WebP knows durations only then
                durations.append(float(picture.info.get("duration") or 0.0))
    except Exception:
        raise DataError(
            f"{file} is neither an image nor a video that can be read here; give a folder of images, a GIF, an "
            f"animated WebP or PNG, or a video ({', '.join(video.READ[:4])})"
        ) from None
    repeats, rate = _even(durations)

    def pictures() -> Iterator[tuple[str, Any]]:
        with Image.open(file) as picture:
            for k, repeat in enumerate(repeats):
                try:
                    picture.seek(k)
                    picture.load()
                    frame: Any = picture.copy()
                except Exception as error:
                    yield f"frame {k}", error
                    continue
                for _ in range(repeat):
                    yield f"frame {k}", frame

    return Clip(str(file), sum(repeats), rate, pictures, shape)


def _even(durations: list[float]) -> tuple[list[int], float | None]:
    """(how often to show each frame, frames per second) so that a constant rate keeps the tempo of these milliseconds.

    Writers of animations merge equal neighbours into one frame that lasts longer.
    """
    known = [d for d in durations if d > 0]
    if not known:
        return [1] * len(durations), None
    shortest = min(known)
    return [max(1, min(LONGEST, round(d / shortest))) for d in durations], 1000.0 / shortest


def _video(file: Path, shape: tuple[int, int, int]) -> Clip:
    total, rate = video.describe(file)
    return Clip(str(file), total, rate, lambda: video.pictures(file), shape)


def check_target(out: Path, source: Path) -> None:
    """Raise ConfigError unless finished frames can go to `out` without harm to anything else.

    Raises DataError for a video where PyAV is not installed.
    """
    suffix = out.suffix.lower()
    if suffix in ANIMATIONS or suffix in video.WRITTEN:
        if suffix in video.WRITTEN:
            video.pyav(f"writing {suffix} files")
        if out.is_dir():
            raise ConfigError(f"{out} is a folder; name a file, or a folder without {out.suffix} in its name")
        if out.exists() and source.exists() and out.samefile(source):
            raise ConfigError(f"{out} is the input; name another file")
    elif out.suffix and not out.is_dir():
        known = ", ".join([*ANIMATIONS, *video.WRITTEN])
        raise ConfigError(f"cannot write {out.suffix} files: name a folder, or a {known} file")
    elif out.exists():
        if not out.is_dir():
            raise ConfigError(f"{out} is a file; name a new folder")
        if source.resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"the input lies in {out}, which would be replaced; name another folder")
        if any(out.iterdir()) and not (out / REPORT).is_file():
            raise ConfigError(f"the folder {out} holds other files; name a new or an empty one")


@dataclass
class Target:
    """Where finished frames go. Nothing is seen of it until it is complete."""

    show: Callable[[Tensor], None]
    """Takes one frame (C, H, W) in [-1, 1], the next one in order."""
    complete: Callable[[dict[str, Any]], None]
    """Takes the report; to be called at the end."""


@contextmanager
def open_target(out: Path, rate: float, zoom: int | None) -> Iterator[Target]:
    """A folder of numbered PNGs with the report beside them, or by suffix an animation or a video of `rate` frames per
    second.

    zoom: enlarges pixels; None: small frames of animations and videos are enlarged for people, not in folders.
    Whatever was at `out` is replaced only if the block succeeds.
    """
    suffix = out.suffix.lower()
    if suffix in video.WRITTEN:
        with replaced_file(out) as temporary, video.open_video(temporary, suffix, rate) as writer:
            yield _video_target(writer, zoom)
    elif suffix in ANIMATIONS:
        with replaced_file(out) as temporary:
            yield _animation_target(temporary, ANIMATIONS[suffix], rate, zoom)
    else:
        with replaced_folder(out) as folder:
            yield _folder_target(folder, zoom or 1)


def _folder_target(folder: Path, zoom: int) -> Target:
    count = 0

    def show(frame: Tensor) -> None:
        nonlocal count
        pixels = imaging.enlarged(imaging.to_pixels(frame), zoom)
        (folder / f"{count:05d}.png").write_bytes(imaging.encode_png(pixels))
        count += 1

    return Target(show, lambda report: write_json(folder / REPORT, report))


def _video_target(writer: video.VideoWriter, zoom: int | None) -> Target:
    def complete(report: dict[str, Any]) -> None:
        if not writer.frames:
            raise DataError("no frame was finished, so there is no video to write")
        writer.finish()

    return Target(lambda frame: writer.write(_visible(frame, zoom)), complete)


def _visible(frame: Tensor, zoom: int | None) -> Tensor:
    """uint8 (C, H, W), enlarged for people where no zoom is given."""
    pixels = imaging.to_pixels(frame)
    return imaging.enlarged(pixels, zoom or imaging.zoom_for(*pixels.shape[1:]))


def _animation_target(file: Path, format: str, rate: float, zoom: int | None) -> Target:
    pictures: list[Any] = []

    def show(frame: Tensor) -> None:
        pictures.append(imaging.to_picture(_visible(frame, zoom)))

    def complete(report: dict[str, Any]) -> None:
        if not pictures:
            raise DataError("no frame was finished, so there is no animation to write")
        first, rest = pictures[0], pictures[1:]
        options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
        duration = max(1, round(1000.0 / rate))
        first.save(file, format, save_all=True, append_images=rest, duration=duration, loop=0, **options)

    return Target(show, complete)
