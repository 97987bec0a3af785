"""Model files of Pliant and of others. One file per format; foreign names never leave this folder."""

from pliant.formats.registry import FORMATS, describe_source, load, load_adapter, save, save_adapter
from pliant.formats.source import Source

__all__ = ["FORMATS", "Source", "describe_source", "load", "load_adapter", "save", "save_adapter"]
