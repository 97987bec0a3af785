"""A live stream of frames through a model: push a frame, get a frame."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.errors import ShapeError
from pliant.plans import Plan
from pliant.tasks.streaming.batch import StreamBatch
from pliant.tasks.streaming.codec import Codec, Pixels
from pliant.tasks.streaming.guidance import StreamGuidance
from pliant.tasks.streaming.similarity import FilterState, SimilarityFilter


@dataclass(frozen=True)
class StreamCounts:
    """What a stream did so far. frames = processed + skipped; rows: network rows over all calls."""

    frames: int = 0
    processed: int = 0
    skipped: int = 0
    network_calls: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Tick:
    """What came of one frame."""

    skipped: bool
    """The filter held it to be the same as the last processed one; nothing was computed."""
    output: Tensor | None
    """A frame that was finished now (it entered `latency` ticks ago), or None."""


class Stream:
    """Image-to-image on a stream: `push(frame) -> frame | None`. One user at a time; not for several threads.

        stream = Stream(pliant.load("digits"), [0.6, 0.45, 0.3, 0.15], label=3, filter=SimilarityFilter(0.98))
        for frame in camera:                    # (C, H, W) floats in [-1, 1]
            if (shown := stream.push(frame)) is not None:
                show(shown)
    """

    def __init__(
        self,
        model: Denoiser,
        plan: Plan | Sequence[float],
        label: int | None = None,
        guidance: StreamGuidance | None = None,
        filter: SimilarityFilter | None = None,
        codec: Codec | None = None,
        seed: int = 0,
        frames: int = 1,
    ) -> None:
        """plan: a plan of single-step updates, or levels (house times, decreasing), see `levels_plan`.

        label: the class; None: unconditional. filter: skips frames; None: processes all. codec: for models of
        latents. seed: of the noise that all frames share. frames: how many are pushed at a time.
        Raises PlanError or ConfigError for what cannot be streamed.
        """
        self.batch = StreamBatch(model, plan, label, guidance, seed, frames)
        self.filter = filter
        self.codec: Codec = codec or Pixels(model.image_shape)
        self.reset()

    def reset(self) -> None:
        """Forget all frames, outputs and counts."""
        self.state = self.batch.empty
        self.counts = StreamCounts()
        self._filter_state = FilterState()
        self._last: Tensor | None = None

    @property
    def latency(self) -> int:
        """Ticks between a processed frame and its output."""
        return len(self.batch.levels) - 1

    def change_label(self, label: int | None) -> None:
        """Another class from the next frame on (frames on their way follow half-way). None: unconditional."""
        self.batch = self.batch.with_label(label)

    def push(self, frame: Tensor) -> Tensor | None:
        """The frame to show now: the latest finished one, shown again while frames are skipped; None at the start.

        frame: (C, H, W) float in [-1, 1], or (frames, C, H, W) where several enter at a time; so is the output.
        """
        tick = self.offer(frame)
        return self._last if tick.skipped else tick.output

    def offer(self, frame: Tensor) -> Tick:
        """As `push`, but says whether the frame was skipped and returns fresh outputs only."""
        block = self._block(frame)
        self.counts = replace(self.counts, frames=self.counts.frames + 1)
        if self.filter is not None:
            process, self._filter_state = self.filter.decide(self._filter_state, block)
            if not process:
                self.counts = replace(self.counts, skipped=self.counts.skipped + 1)
                return Tick(True, None)
        self.counts = replace(self.counts, processed=self.counts.processed + 1)
        return Tick(False, self._tick(self.codec.encode(block.to(self.batch.model.device)), frame.ndim))

    def flush(self) -> Iterator[Tensor]:
        """The frames still on their way, in order; nothing enters."""
        ndim = 3 if self.batch.frames == 1 else 4
        while self.state.levels:
            done = self._tick(None, ndim)
            if done is not None:
                yield done

    def _tick(self, latents: Tensor | None, ndim: int) -> Tensor | None:
        busy = len(self.state.levels) + (latents is not None)
        self.state, done = self.batch.tick(self.state, latents)
        extra = {"full": busy, "onetime": int(latents is not None)}.get(self.batch.guidance.negative, 0)
        rows = (busy + extra) * self.batch.frames
        self.counts = replace(
            self.counts, network_calls=self.counts.network_calls + 1, rows=self.counts.rows + rows
        )
        if done is None:
            return None
        frames = self.codec.decode(done)
        self._last = frames[0] if ndim == 3 else frames
        return self._last

    def _block(self, frame: Tensor) -> Tensor:
        """(frames, C, H, W)."""
        block = frame[None] if frame.ndim == 3 else frame
        wanted = (self.batch.frames, *self.codec.frame_shape)
        if tuple(block.shape) != wanted:
            raise ShapeError(
                f"this stream takes frames of {wanted} (frames, channels, height, width), got {tuple(frame.shape)}"
            )
        return block.to(torch.float32)


class Aligned:
    """Outputs in step with their inputs: exactly one for every frame, in order, however late and however many skipped.

    For files, where nothing may be missing; a live stream shows what `Stream.push` returns. A skipped frame gets the
    output of the frame it resembles. Starts the stream anew.
    """

    def __init__(self, stream: Stream) -> None:
        stream.reset()
        self.stream = stream
        self._waiting: deque[int] = deque()  # per frame: the how-manieth processed frame it is shown as
        self.finished = 0
        """Processed frames whose output is known."""
        self._latest: Tensor | None = None

    def add(self, frame: Tensor) -> list[Tensor]:
        """The outputs that became known with this frame."""
        tick = self.stream.offer(frame)
        self._waiting.append(self.stream.counts.processed)
        found = self._known() if tick.skipped else []
        return found if tick.output is None else self._finish(tick.output)

    def finish(self) -> list[Tensor]:
        """The outputs of all frames still on their way."""
        return [shown for output in self.stream.flush() for shown in self._finish(output)]

    def _finish(self, output: Tensor) -> list[Tensor]:
        self.finished, self._latest = self.finished + 1, output
        return self._known()

    def _known(self) -> list[Tensor]:
        found = []
        while self._waiting and self._latest is not None and self._waiting[0] == self.finished:
            self._waiting.popleft()
            found.append(self._latest)
        return found


def process(stream: Stream, frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """One output per frame, in order (see `Aligned`)."""
    aligned = Aligned(stream)
    for frame in frames:
        yield from aligned.add(frame)
    yield from aligned.finish()
