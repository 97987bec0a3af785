"""Streams of frames through a few-step model (StreamDiffusion, arXiv 2312.12491)."""

from pliant.tasks.streaming.batch import StreamBatch, StreamState
from pliant.tasks.streaming.codec import Codec, Latents, Pixels, open_codec
from pliant.tasks.streaming.guidance import StreamGuidance
from pliant.tasks.streaming.levels import FOLLOW, RENOISE, consistency_plan, even_levels, levels_plan
from pliant.tasks.streaming.pace import Pace, paced
from pliant.tasks.streaming.queues import DroppingMailbox, Mailbox, run_threads
from pliant.tasks.streaming.similarity import FilterState, SimilarityFilter
from pliant.tasks.streaming.stream import Aligned, Stream, StreamCounts, Tick, process

__all__ = [
    "FOLLOW",
    "RENOISE",
    "Aligned",
    "Codec",
    "DroppingMailbox",
    "FilterState",
    "Latents",
    "Mailbox",
    "Pace",
    "Pixels",
    "SimilarityFilter",
    "Stream",
    "StreamBatch",
    "StreamCounts",
    "StreamGuidance",
    "StreamState",
    "Tick",
    "consistency_plan",
    "even_levels",
    "levels_plan",
    "open_codec",
    "paced",
    "process",
    "run_threads",
]
