"""Eight-bit rounding, data set readers, and the ADM npz format with its damaged cousins."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pliant.errors import DataError, FormatError, ShapeError
from pliant.evaluation import (
    FeatureStatistics,
    ImageSet,
    digits,
    from_uint8,
    images_from_folder,
    images_from_parquet,
    npz_batches,
    npz_statistics,
    read_npz,
    to_uint8,
    write_npz,
    write_npz_statistics,
)


def pictures(n: int = 5, size: int = 4) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8)


def png(pixels: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def test_eight_bits_round_trip_exactly() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(every)), every)
    assert to_uint8(torch.tensor([-7.0, -1.0, 1.0, 7.0])).tolist() == [0, 0, 255, 255]
    with pytest.raises(DataError, match="NaN"):
        to_uint8(torch.tensor([float("nan")]))
    with pytest.raises(DataError):
        to_uint8(every)
    with pytest.raises(DataError):
        from_uint8(torch.zeros(1))


def test_digits_splits_are_disjoint_and_complete() -> None:
    train, test, everything = digits("train"), digits("test"), digits()
    assert (len(train), len(test), len(everything)) == (1437, 360, 1797)
    assert train.images.shape == (1437, 1, 8, 8)
    x, y = test.tensors()
    assert x.min() == -1 and x.max() == 1 and set(y.tolist()) == set(range(10))
    assert torch.equal(everything.images[::5], test.images)
    assert test.fingerprint() == digits("test").fingerprint() != train.fingerprint()
    with pytest.raises(DataError, match="validation"):
        digits("validation")


def test_image_set_checks_itself() -> None:
    with pytest.raises(ShapeError):
        ImageSet("x", torch.zeros(2, 3, 4, 4))
    with pytest.raises(ShapeError):
        ImageSet("x", pictures(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match="no labels"):
        ImageSet("x", pictures(3)).tensors()


def test_folder_with_and_without_classes(tmp_path: Path) -> None:
    x = pictures(3)
    for name, pixels in zip(("b/1.png", "a/deep/2.png", "b/3.png"), x, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(pixels))
    images = images_from_folder(tmp_path)
    assert torch.equal(images.images, x[[1, 0, 2]])
    assert images.labels is not None and images.labels.tolist() == [0, 1, 1]
    assert images_from_folder(tmp_path / "b").labels is None
    assert images_from_folder(tmp_path, size=(8, 6)).images.shape == (3, 3, 8, 6)

    (tmp_path / "a" / "large.png").write_bytes(png(pictures(1, 9)[0]))
    with pytest.raises(DataError, match="pass size"):
        images_from_folder(tmp_path)
    (tmp_path / "a" / "large.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"large\.png is not a readable image"):
        images_from_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        images_from_folder(tmp_path / "empty")


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    x = pictures(2)
    rows = [{"bytes": png(p), "path": None} for p in x]
    pq.write_table(pa.table({"image": rows, "label": [3, 1]}), tmp_path / "ok.parquet")
    images = images_from_parquet(tmp_path / "ok.parquet")
    assert torch.equal(images.images, x)
    assert images.labels is not None and images.labels.tolist() == [3, 1]

    pq.write_table(pa.table({"image": rows, "label": ["a", "b"]}), tmp_path / "text.parquet")
    assert images_from_parquet(tmp_path / "text.parquet").labels is None
    pq.write_table(pa.table({"picture": [1]}), tmp_path / "columns.parquet")
    pq.write_table(pa.table({"image": ["x"]}), tmp_path / "strings.parquet")
    pq.write_table(pa.table({"image": [*rows, None]}), tmp_path / "hole.parquet")
    (tmp_path / "junk.parquet").write_bytes(b"PAR1 junk")
    for name in ("columns", "strings", "hole", "junk", "missing"):
        with pytest.raises(DataError, match=name):
            images_from_parquet(tmp_path / f"{name}.parquet")


def test_npz_round_trip_and_streaming(tmp_path: Path) -> None:
    x, y = pictures(7), torch.arange(7)
    path = tmp_path / "samples.npz"
    write_npz(path, x, y)
    with np.load(path) as theirs:  # what other evaluators see
        assert theirs["arr_0"].shape == (7, 4, 4, 3) and theirs["arr_0"].dtype == np.uint8
    back = read_npz(path)
    assert torch.equal(back.images, x) and back.labels is not None and torch.equal(back.labels, y)
    assert [len(b) for b in npz_batches(path, 3)] == [3, 3, 1]
    assert npz_statistics(path) is None
    np.savez_compressed(path, arr_0=x.permute(0, 2, 3, 1).contiguous().numpy())
    assert torch.equal(read_npz(path).images, x)
    write_npz(path, x[:, :1])
    assert torch.equal(read_npz(path).images, x[:, :1].expand(-1, 3, -1, -1))


def test_npz_statistics_round_trip(tmp_path: Path) -> None:
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    s = FeatureStatistics.of(features, {"extractor": "inception-v3-pool3"})
    write_npz_statistics(tmp_path / "s.npz", s)
    back = npz_statistics(tmp_path / "s.npz")
    assert back is not None and torch.equal(back.mean, s.mean) and torch.equal(back.cov, s.cov)
    with pytest.raises(DataError, match="Inception"):
        write_npz_statistics(tmp_path / "s.npz", FeatureStatistics.of(features, {"extractor": "digits"}))
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(FormatError, match="mu and sigma"):
        npz_statistics(tmp_path / "bad.npz")


def test_damaged_npz_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    write_npz(good, pictures(20))
    data = good.read_bytes()

    def refused(content: bytes) -> None:
        bad = tmp_path / "bad.npz"
        bad.write_bytes(content)
        with pytest.raises(FormatError, match=r"bad\.npz"):
            read_npz(bad)

    refused(b"")
    refused(b"no zip at all")
    refused(data[: len(data) // 2])
    middle = len(data) // 2
    refused(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])  # one wrong pixel: checksum

    with pytest.raises(FormatError):
        read_npz(tmp_path / "missing.npz")
    other = tmp_path / "other.npz"
    for array in (np.zeros((2, 4, 4, 3)), np.zeros((2, 4), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)):
        np.savez(other, arr_0=array)
        with pytest.raises(FormatError, match="expected uint8"):
            read_npz(other)
    np.savez(other, arr_0=np.array([{"a": 1}], dtype=object))
    with pytest.raises(FormatError, match="pickled"):
        read_npz(other)
    np.savez(other, images=np.zeros(3))
    with pytest.raises(FormatError, match="arr_0"):
        read_npz(other)
    # A header that promises far more than the archive holds must not be believed.
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 256, 256, 3)}
    )
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue())
    with pytest.raises(FormatError, match="damaged"):
        next(npz_batches(other, 10))
