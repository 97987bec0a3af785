"""Reference statistics of a data set: what samples are compared with."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pliant.errors import DataError, FormatError
from pliant.evaluation.features import INCEPTION, FeatureExtractor
from pliant.evaluation.images import ImageSet, digits, images_from_folder, images_from_parquet
from pliant.evaluation.npz import npz_batches, npz_length, npz_spatial_statistics, npz_statistics, write_npz_statistics
from pliant.evaluation.statistics import FeatureStatistics
from pliant.evaluation.streaming import KEPT_FEATURES, Measured
from pliant.files import replaced_file

_CACHE: OrderedDict[tuple[str, str], Reference] = OrderedDict()


@dataclass(frozen=True, eq=False)
class Reference:
    """statistics: of the whole set; features: (<= 10,000, D) of a fixed random part, or None for stored statistics;
    spatial: statistics of an extractor's spatial features, or None.
    """

    name: str
    statistics: FeatureStatistics
    features: Tensor | None = None
    spatial: FeatureStatistics | None = None


def _provenance(extractor: FeatureExtractor, name: str, sha256: str) -> dict[str, str]:
    return {
        "extractor": extractor.name,
        "extractor_sha256": extractor.fingerprint,
        "preprocessing": extractor.preprocessing,
        "reference": name,
        "reference_sha256": sha256,
    }


def reference_of(images: ImageSet, extractor: FeatureExtractor, batch: int = 256) -> Reference:
    """Statistics of an image set. The last four results are kept in memory, keyed by content and extractor."""
    sha256 = images.fingerprint()
    key = (sha256, extractor.fingerprint)
    if key not in _CACHE:
        facts = _provenance(extractor, images.name, sha256)
        _CACHE[key] = _measured(images.name, images.batches(batch), len(images), extractor, facts)
        while len(_CACHE) > 4:
            _CACHE.popitem(last=False)
    return _CACHE[key]


def _measured(
    name: str, batches: Iterable[Tensor], total: int, extractor: FeatureExtractor, facts: dict[str, str]
) -> Reference:
    """A reference from a stream of `total` uint8 images; of more than 10,000 a fixed random part's features is kept."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[order[:KEPT_FEATURES]] = True
    whole, kept, place = Measured(), [], 0
    for images in batches:
        part = Measured()
        part.add(extractor, images, 0, cap=len(images))
        kept.append(part.features[chosen[place : place + len(images)]])
        part.kept.clear()
        whole.merge(part)
        place += len(images)
    spatial = None if whole.spatial is None else whole.spatial.statistics(facts)
    return Reference(name, whole.moments.statistics(facts), torch.cat(kept), spatial)


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _npz_reference(path: Path, extractor: FeatureExtractor, batch: int) -> Reference:
    sha256 = _file_sha256(path)
    stored, total = npz_statistics(path), npz_length(path)
    facts = _provenance(extractor, path.name, sha256)
    shown = None if not total else _measured(path.name, npz_batches(path, batch), total, extractor, facts)
    if stored is None or extractor.name != INCEPTION:
        if shown is None:
            raise FormatError(
                f"{path} is not a readable .npz of images (arr_0)"
                + ("; its mu and sigma are Inception's" if stored else "")
            )
        return shown
    spatial = npz_spatial_statistics(path)
    # Whose preprocessing made them the file does not say.
    facts = {**stored.provenance, "reference_sha256": sha256}
    return Reference(
        path.name,
        replace(stored, provenance=facts),
        None if shown is None else shown.features,
        None if spatial is None else replace(spatial, provenance=facts),
    )


def load_reference(
    source: str | Path, extractor: FeatureExtractor, batch: int = 256, size: tuple[int, int] | None = None
) -> Reference:
    """The reference that a user names.

    source: "digits" (all), "digits:train", "digits:test", a Parquet file, a folder of images, an ADM .npz, or
    saved .safetensors statistics; size: (H, W) to crop and resize Parquet and folder images to.

    An .npz with stored mu and sigma is used as is with Inception (its images may be only a part of the set, from which
    precision, recall and kernel distances are taken, as ADM does); with any other extractor its images are measured.
    Raises DataError or FormatError.
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


def save_reference(path: str | Path, reference: Reference) -> None:
    """Statistics for later runs, written atomically: .npz with mu and sigma (Inception only), or .safetensors (any
    extractor). Features are not stored, so distances that need them cannot be computed from the file.

    Raises DataError for other names, or for an .npz of another extractor.
    """
    path = Path(path)
    if path.suffix == ".npz":
        write_npz_statistics(path, reference.statistics, reference.spatial)
    elif path.suffix == ".safetensors":
        with replaced_file(path) as temporary:
            reference.statistics.save(temporary)
    else:
        raise DataError(f"{path}: statistics are saved as .safetensors, or as .npz for Inception")
