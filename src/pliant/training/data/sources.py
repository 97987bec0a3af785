"""Where images come from: a folder, Parquet files, a Hub data set. Nothing is decoded here."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pliant.errors import DataError, suggest

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Source:
    """Undecoded images: `cell(i)` is what `decode.open_cell` reads, `name(i)` is for messages."""

    labels: np.ndarray
    class_names: tuple[str, ...]
    cell: Callable[[int], Any]
    name: Callable[[int], str]
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Source:
        """Only the first `count` images (None: all)."""
        return replace(self, labels=self.labels[:count])


def open_source(
    source: str, split: str = "train", image_column: str = "image", label_column: str | None = "label"
) -> Source:
    """Find out what `source` names and open it. Raises DataError if it is missing, empty or lacks a column.

    source: a folder (sub-folders are classes, or `metadata.jsonl`), a Parquet file or glob, or a Hub data set
    name.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        parquet = sorted(path.glob("**/*.parquet"))
        return _parquet(parquet, image_column, label_column) if parquet else _folder(path, label_column)
    files = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(path)))]
    if files:
        if any(file.suffix != ".parquet" for file in files):
            raise DataError(f"{source}: expected a folder of images or .parquet files, got {files[0].name}")
        return _parquet(files, image_column, label_column)
    if source.startswith((".", "/", "~")) or source.endswith(".parquet") or source.count("/") > 1:
        raise DataError(f"data source {source} does not exist (relative to {Path.cwd()})")
    return _hub(source, split, image_column, label_column)


def _folder(folder: Path, label_column: str | None) -> Source:
    metadata = folder / "metadata.jsonl"
    files: list[Path] = []
    raw_labels: list[Any] = []
    if metadata.is_file():
        for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                files.append(folder / row["file_name"])
                raw_labels.append(0 if label_column is None else row[label_column])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{metadata}, line {number}: expected JSON with 'file_name' and {label_column!r}, "
                    f"got an error: {error}"
                ) from None
    else:
        files = sorted(f for f in folder.glob("**/*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
        # The first folder below the root is the class; images in the root itself form one unnamed class.
        raw_labels = [f.relative_to(folder).parts[0] if f.parent != folder else "" for f in files]
    if not files:
        raise DataError(
            f"no images in {folder}: expected {', '.join(sorted(IMAGE_SUFFIXES))} in one sub-folder per class"
        )
    labels, names = _encode_labels(raw_labels, None)
    return Source(labels, names, lambda i: files[i], lambda i: str(files[i].relative_to(folder)))


def _encode_labels(raw: Sequence[Any], names: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Integer labels and class names. Integers are kept; text becomes its place in sorted order."""
    if names is None and raw and isinstance(raw[0], str):
        names = sorted(set(raw))
        place = {name: i for i, name in enumerate(names)}
        raw = [place[value] for value in raw]
    try:
        labels = np.asarray(raw, dtype=np.int64)
    except (TypeError, ValueError):
        raise DataError(
            "labels must be whole numbers or text, one per image; some are missing or of another type"
        ) from None
    if labels.size and labels.min() < 0:
        raise DataError(
            f"labels must be 0 or more, found {labels.min()} (unlabelled test data?); use label_column: null"
        )
    if names is None:
        names = [str(i) for i in range(int(labels.max()) + 1 if labels.size else 0)]
    return labels, tuple(names)


def _parquet(files: Sequence[Path], image_column: str, label_column: str | None) -> Source:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    columns = [image_column] + ([] if label_column is None else [label_column])
    tables = []
    class_names: Sequence[str] | None = None
    for file in files:
        try:
            schema = pq.read_schema(file)
            _need_columns(columns, schema.names, str(file))
            tables.append(pq.read_table(file, columns=columns))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file} is not a readable Parquet file: {str(error).splitlines()[0]}") from None
        class_names = class_names or _hugging_face_names(schema.metadata, label_column)
    # `datasets` has written large_binary and binary over time: let Arrow find the common type.
    table = pa.concat_tables(tables, promote_options="permissive")
    if table.num_rows == 0:
        raise DataError(f"{files[0]} holds no rows")
    raw = [0] * table.num_rows if label_column is None else table[label_column].to_pylist()
    labels, names = _encode_labels(raw, class_names)
    # One contiguous chunk makes cell access O(1); a table beyond 2 GB of image bytes keeps its chunks.
    images = table[image_column]
    return Source(labels, names, lambda i: images[i].as_py(), lambda i: f"row {i} of {files[0].name}", files[0].parent)


def _need_columns(wanted: Sequence[str], present: Sequence[str], where: str) -> None:
    for name in wanted:
        if name not in present:
            hint = suggest(name, present)
            raise DataError(
                f"{where} has no column {name!r}: {hint} Set image_column / label_column (null: no labels)."
            )


def _hugging_face_names(metadata: dict[bytes, bytes] | None, label_column: str | None) -> list[str] | None:
    """Class names that `datasets` stores in the Parquet schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return list(features[label_column]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _hub(name: str, split: str, image_column: str, label_column: str | None) -> Source:
    import datasets

    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:  # datasets raises many unrelated types for "not found" and "no network"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot load data set {name!r} (no such file here; Hub said: {reason})") from None
    columns = [image_column] + ([] if label_column is None else [label_column])
    _need_columns(columns, data.column_names, f"data set {name}")
    class_names = None if label_column is None else getattr(data.features[label_column], "names", None)
    data = data.cast_column(image_column, datasets.Image(decode=False))
    raw = [0] * len(data) if label_column is None else list(data[label_column])
    labels, names = _encode_labels(raw, class_names)
    return Source(labels, names, lambda i: data[i][image_column], lambda i: f"row {i} of {name}")
