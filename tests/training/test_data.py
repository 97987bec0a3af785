"""Sources, decoding, damaged files, and the order of samples."""

import io
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pliant.errors import DataError
from pliant.training.data import EpochOrder, Feed, ImageSet, LazyImageSet, digits, open_images, open_source
from pliant.training.data.decode import to_pixels
from pliant.training.draws import Draws

SIZE = (8, 8)


def png(color: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(file: Path, cells: list[bytes], labels: list[int] | None, names: list[str] | None = None) -> None:
    """As `datasets` writes it: image structs, and class names in the schema."""
    columns = {"image": pa.array([{"bytes": c, "path": None} for c in cells])}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    table = pa.table(columns)
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file)


def folder(root: Path) -> Path:
    for name, color in (("cat", (255, 0, 0)), ("ant", (0, 255, 0))):
        (root / name).mkdir(parents=True)
        for i in range(2):
            (root / name / f"{i}.png").write_bytes(png(color))
    return root


def test_folder_of_classes(tmp_path: Path) -> None:
    data = open_images(str(folder(tmp_path)), 3, SIZE)
    assert data.class_names == ("ant", "cat")
    assert data.labels.tolist() == [0, 0, 1, 1]
    none = torch.zeros(4, dtype=torch.bool)
    images = data.samples(torch.arange(4), none, Draws.single(4))
    assert images[0, :, 0, 0].tolist() == [-1.0, 1.0, -1.0]
    assert images.shape == (4, 3, 8, 8)


def test_folder_with_metadata(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png((0, 0, 0)))
    (tmp_path / "b.png").write_bytes(png((0, 0, 0)))
    rows = [{"file_name": "a.png", "label": "dog"}, {"file_name": "b.png", "label": "cat"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = open_source(str(tmp_path))
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [1, 0]
    (tmp_path / "metadata.jsonl").write_text('{"file": "a.png"}')
    with pytest.raises(DataError, match="line 1"):
        open_source(str(tmp_path))


def test_parquet_with_class_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d.parquet", [png((i, i, i)) for i in (0, 255)], [1, 0], ["x", "y"])
    data = open_images(str(tmp_path / "d.parquet"), 1, SIZE)
    assert data.class_names == ("x", "y")
    images = data.samples(torch.arange(2), torch.zeros(2, dtype=torch.bool), Draws.single(2))
    assert images[:, 0, 0, 0].tolist() == [-1.0, 1.0]


def test_several_parquet_files_and_a_folder_of_them(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0.parquet", [png((0, 0, 0))] * 2, [0, 1])
    write_parquet(tmp_path / "1.parquet", [png((0, 0, 0))] * 3, [2, 2, 2])
    for source in (str(tmp_path), str(tmp_path / "*.parquet")):
        assert open_source(source).labels.tolist() == [0, 1, 2, 2, 2]


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    image = Image.new("RGB", (8, 8), (255, 255, 255))
    local = datasets.Dataset.from_dict({"image": [image, image], "label": [1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: local)
    data = open_images("someone/something", 3, SIZE)
    assert data.class_names == ("no", "yes")
    assert data.labels.tolist() == [1, 0]
    assert len(data.samples(torch.tensor([0]), torch.tensor([False]), Draws.single(1)).unique()) == 1


def test_digits_are_exact_and_split_like_the_evaluation() -> None:
    from sklearn.datasets import load_digits

    raw = load_digits()
    train, test = digits(1, SIZE, "train"), digits(1, SIZE, "test")
    assert len(test) == 360
    assert len(train) + len(test) == 1797
    assert np.array_equal(test.pixels[1, 0].numpy(), (raw.images[5] / 8 - 1).astype(np.float32))
    assert digits(3, (16, 16), "all").shape == (3, 16, 16)


def test_damaged_images_are_skipped_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder(tmp_path)
    (root / "cat" / "0.png").write_bytes(png((1, 2, 3))[:40])
    (root / "ant" / "bad.jpg").write_bytes(b"not an image")
    with caplog.at_level(logging.WARNING, "pliant.training"):
        data = open_images(str(root), 3, SIZE)
    assert isinstance(data, ImageSet)
    assert data.labels.tolist() == [0, 0, 1]
    (record,) = caplog.records
    assert "2 of 5" in record.getMessage()
    for name in ("bad.jpg", "0.png"):
        assert name in record.getMessage()


def test_large_sets_are_decoded_on_the_fly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "d.parquet", [png((i, i, i)) for i in range(5)], [0, 1, 2, 3, 4])
    memory = open_images(str(tmp_path / "d.parquet"), 3, SIZE, limit=4)
    monkeypatch.setattr("pliant.training.data.images.MEMORY_LIMIT", 4 * 3 * 8 * 8 - 1)
    lazy = open_images(str(tmp_path / "d.parquet"), 3, SIZE, limit=4)
    assert isinstance(memory, ImageSet)
    assert isinstance(lazy, LazyImageSet)
    assert len(lazy) == 4
    args = torch.tensor([3, 0, 2]), torch.tensor([True, False, False]), Draws.single(3)
    assert torch.equal(memory.samples(*args), lazy.samples(*args))


def test_lazy_set_replaces_damaged_images_by_the_same_class(tmp_path: Path) -> None:
    cells = [png((0, 0, 0)), b"damaged", png((255, 255, 255)), png((0, 0, 0))]
    write_parquet(tmp_path / "d.parquet", cells, [0, 0, 1, 0])
    data = LazyImageSet(open_source(str(tmp_path / "d.parquet")), 1, SIZE)
    images = data.samples(torch.arange(4), torch.zeros(4, dtype=torch.bool), Draws.single(4))
    assert images[:, 0, 0, 0].tolist() == [-1.0, -1.0, 1.0, -1.0]
    assert data.skipped == ("row 1 of d.parquet",)
    assert data.shape == (1, 8, 8)


@pytest.mark.parametrize("problem", ["empty", "missing", "image", "label", "truncated", "suffix", "negative", "rows"])
def test_unusable_data(problem: str, tmp_path: Path) -> None:
    file = tmp_path / "d.parquet"
    source, expected = str(file), "column"
    if problem == "empty":
        source, expected = str(tmp_path), "no images"
    elif problem == "missing":
        expected = "does not exist"
    elif problem == "image":
        pq.write_table(pa.table({"img": [b""], "label": [0]}), file)
        expected = "did you mean 'img'"
    elif problem == "label":
        write_parquet(file, [png((0, 0, 0))], None)
    elif problem == "truncated":
        write_parquet(file, [png((0, 0, 0))], [0])
        file.write_bytes(file.read_bytes()[:-30])
        expected = "not a readable Parquet"
    elif problem == "suffix":
        source, expected = str(tmp_path / "d.txt"), "expected a folder"
        Path(source).write_text("hello")
    elif problem == "negative":
        write_parquet(file, [png((0, 0, 0))], [-1])
        expected = "0 or more"
    elif problem == "rows":
        write_parquet(file, [], [])
        expected = "no rows"
    with pytest.raises(DataError, match=expected):
        open_images(source, 3, SIZE)


def test_nothing_readable(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d.parquet", [b"x", b"y"], [0, 0])
    with pytest.raises(DataError, match="none of the 2"):
        open_images(str(tmp_path / "d.parquet"), 3, SIZE)


def test_unlabelled_data_is_one_class(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d.parquet", [png((0, 0, 0))] * 3, None)
    data = open_images(str(tmp_path / "d.parquet"), 3, SIZE, label_column=None)
    assert data.labels.tolist() == [0, 0, 0]


def test_decoding_crops_the_centre_and_whitens_transparency() -> None:
    wide = Image.new("RGB", (24, 8), (0, 0, 0))
    wide.paste((255, 255, 255), (8, 0, 16, 8))
    assert bool((to_pixels(wide, 3, SIZE) == 255).all())
    assert bool((to_pixels(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), 3, SIZE) == 255).all())
    assert to_pixels(Image.new("L", (5, 9)), 3, (4, 6)).shape == (3, 4, 6)


def test_every_epoch_covers_every_sample_once() -> None:
    order = EpochOrder(13, seed=1)
    stream = torch.cat([order.indices(range(start, start + 5)) for start in range(0, 65, 5)])
    epochs = stream.view(5, 13)
    assert all(sorted(epoch.tolist()) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 5
    assert not torch.equal(EpochOrder(13, 2).indices(range(13)), epochs[0])


def test_batches_do_not_depend_on_how_rows_are_divided() -> None:
    data = digits(1, SIZE)
    feed = Feed(data, seed=4, flip=True, partners=True)
    whole = feed.batch(9, range(8), 8)
    parts = [Feed(data, seed=4, flip=True, partners=True).batch(9, rows, 8) for rows in (range(3), range(3, 8))]
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
    assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
    assert whole.partners is not None
    assert torch.equal(whole.partners, torch.cat([part.partners for part in parts if part.partners is not None]))


def test_half_of_the_samples_are_mirrored_and_partners_share_the_label() -> None:
    ramp = torch.arange(8.0).expand(100, 1, 8, 8) / 8
    labels = torch.arange(100) % 4
    marked = ramp + labels[:, None, None, None]
    data = ImageSet(marked, labels, ("a", "b", "c", "d"))
    batch = Feed(data, seed=0, flip=True, partners=True).batch(0, range(1000), 1000)
    mirrored = batch.images[:, 0, 0, 0] > batch.images[:, 0, 0, 7]
    assert float(mirrored.float().mean()) == pytest.approx(0.5, abs=5 * 0.5 / 1000**0.5)
    assert batch.partners is not None
    assert torch.equal(batch.partners.amin((1, 2, 3)).floor().long(), batch.labels)
    still = Feed(data, seed=0).batch(0, range(100), 100)
    assert not bool((still.images[:, 0, 0, 0] > still.images[:, 0, 0, 7]).any())


@pytest.mark.needs_shared
def test_cifar(shared: Path) -> None:
    data = open_images(str(shared / "data" / "cifar10-test.parquet"), 3, (32, 32), limit=50)
    assert data.class_names[3] == "cat"
    assert data.shape == (3, 32, 32)
    assert len(data.labels) == 50
