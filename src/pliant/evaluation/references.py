"""Reference statistics of a data set: what samples are compared with."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pliant.errors import DataError
from pliant.evaluation.features import FeatureExtractor, extract
from pliant.evaluation.images import ImageSet, digits, images_from_folder, images_from_parquet
from pliant.evaluation.npz import npz_batches, npz_statistics
from pliant.evaluation.statistics import FeatureStatistics

KEPT_FEATURES = 10_000  # for the kernel distance and precision/recall, whose cost is quadratic
_CACHE: OrderedDict[tuple[str, str], Reference] = OrderedDict()


@dataclass(frozen=True, eq=False)
class Reference:
    """statistics: of the whole set; features: (<= 10,000, D) of a fixed random part, or None for stored
    statistics.
    """

    name: str
    statistics: FeatureStatistics
    features: Tensor | None = None


def _provenance(extractor: FeatureExtractor, name: str, sha256: str) -> dict[str, str]:
    return {
        "extractor": extractor.name,
        "extractor_sha256": extractor.fingerprint,
        "preprocessing": extractor.preprocessing,
        "reference": name,
        "reference_sha256": sha256,
    }


def reference_of(images: ImageSet, extractor: FeatureExtractor, batch: int = 256) -> Reference:
    """Statistics of an image set. The last four results are kept in memory, keyed by content and
    extractor.
    """
    sha256 = images.fingerprint()
    key = (sha256, extractor.fingerprint)
    if key not in _CACHE:
        features = extract(extractor, images.batches(batch))
        statistics = FeatureStatistics.of(features, _provenance(extractor, images.name, sha256))
        _CACHE[key] = Reference(images.name, statistics, _part(features))
        while len(_CACHE) > 4:
            _CACHE.popitem(last=False)
    return _CACHE[key]


def _part(features: Tensor) -> Tensor:
    """At most KEPT_FEATURES rows, always the same ones."""
    if len(features) <= KEPT_FEATURES:
        return features
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    return features[order[:KEPT_FEATURES].sort().values]


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _npz_reference(path: Path, extractor: FeatureExtractor, batch: int) -> Reference:
    sha256 = _file_sha256(path)
    stored = npz_statistics(path)
    if stored is not None and extractor.name == "inception-v3-pool3":
        facts = {**stored.provenance, "reference_sha256": sha256}
        return Reference(path.name, FeatureStatistics(None, stored.mean, stored.cov, facts))

    def features() -> Iterator[Tensor]:
        for images in npz_batches(path, batch):
            yield extract(extractor, [images])

    everything = torch.cat(list(features()))
    statistics = FeatureStatistics.of(everything, _provenance(extractor, path.name, sha256))
    return Reference(path.name, statistics, _part(everything))


def load_reference(
    source: str | Path, extractor: FeatureExtractor, batch: int = 256, size: tuple[int, int] | None = None
) -> Reference:
    """The reference that a user names.

    source: "digits" (all), "digits:train", "digits:test", a Parquet file, a folder of images, an ADM .npz, or
    saved .safetensors statistics; size: (H, W) to crop and resize Parquet and folder images to.

    An .npz with stored mu and sigma is used as is with Inception (its images may be only a part of the set);
    with any other extractor its images are measured.  Raises DataError or FormatError.
    """
    if str(source) == "digits" or str(source).startswith("digits:"):
        return reference_of(digits(str(source)[7:] or "all"), extractor, batch)
    path = Path(source)
    if not path.exists():
        raise DataError(f"{path} does not exist; expected 'digits', a folder, or a .parquet, .npz, .safetensors file")
    if path.is_dir():
        return reference_of(images_from_folder(path, size), extractor, batch)
    if path.suffix == ".parquet":
        return reference_of(images_from_parquet(path, size), extractor, batch)
    if path.suffix == ".npz":
        return _npz_reference(path, extractor, batch)
    if path.suffix == ".safetensors":
        statistics = FeatureStatistics.load(path)
        made_by = statistics.provenance.get("extractor")
        if made_by != extractor.name:
            raise DataError(f"{path} holds statistics of {made_by!r}, not of {extractor.name!r}; pick that extractor")
        return Reference(statistics.provenance.get("reference", path.name), statistics)
    raise DataError(f"{path}: unknown kind {path.suffix!r}; expected a folder, .parquet, .npz or .safetensors")
