"""The ways in which data sets have images: whichever it is, the collator gets that image."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from kt_hf import KTAMXConfigError
from kt_hf.train.config.read import read_arguments
from kt_hf.train.data import sources
from kt_hf.train.data.images import parts_of, with_images
from kt_hf.train.data.messages import BadRow
from kt_hf.train.data.rows import Rows, training_and_evaluation
from kt_hf.train.data.vision import prepare_vision
from kt_hf.train.models import load_tokenizer
from kt_hf.train.processor import load_processor
from tests.support.tiny import write_yaml

pytest.importorskip("torchvision", reason="processors of models that see need it")
from tests.support.seeing import images_in, save_seeing

ANSWER = {"role": "assistant", "content": "red"}
ASKED = [{"role": "user", "content": "<image>What?"}, ANSWER]
# As datasets' Image has it in files.
STORED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seeing("qwen3_vl_moe", tmp_path_factory.mktemp("seeing"))


def settings_of(dataset: str | Path, seeing: Path, folder: Path) -> Any:
    keys = {"model_name_or_path": str(seeing), "dataset": str(dataset), "output_dir": str(folder / "out")}
    return read_arguments(write_yaml(folder / "run.yaml", **keys), [])


def prepared(dataset: str | Path, seeing: Path, folder: Path) -> list[list[Image.Image]]:
    """The images of each row, as TRL's collator gets them."""
    settings = settings_of(dataset, seeing, folder)
    return collated(training_and_evaluation(settings, sees=True)[0], settings.run)


def collated(rows: Rows, keys: Any) -> list[list[Image.Image]]:
    tokenizer, _ = load_tokenizer(keys, chat=True)
    data = prepare_vision(rows, load_processor(keys, tokenizer), 1024, len(tokenizer), "train")
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for ids, row in zip(data.sequences, data.dataset, strict=True):
        assert ids.count(image) == 12 * len(row["images"])
    return [row["images"] for row in data.dataset]


def color(image: Image.Image) -> tuple[int, ...]:
    return image.convert("RGB").getpixel((0, 0))


def of_file(number: int) -> tuple[int, ...]:
    """The color of a file by `images_in`."""
    return 255 * (number % 2), 40 * number, 90


def parquet(file: Path, images: Any, kind: pa.DataType) -> Path:
    messages = pa.array([ASKED] * len(images))
    pyarrow.parquet.write_table(pa.table({"messages": messages, "image": pa.array(images, kind)}), file)
    return file


def uri(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


@pytest.mark.parametrize("form", ["relative", "absolute", "file", "data"])
def test_as_text(form: str, seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths begin at the data's file, before where the program runs, which has other images of these names."""
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    for folder in (elsewhere, here):
        folder.mkdir()
        images_in(folder, 3)
    (elsewhere / "2.png").unlink()
    (elsewhere / "1.png").rename(elsewhere / "2.png")
    monkeypatch.chdir(elsewhere)
    file = here / "2.png"
    text = {"relative": "2.png", "absolute": str(file), "file": f"file://{file}", "data": uri(file)}[form]
    part = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": text}}, {"type": "text", "text": "a"}],
    }
    rows = [{"messages": ASKED, "images": [text]}, {"messages": [part, ANSWER]}]
    (here / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = prepared(here / "data.jsonl", seeing, tmp_path)
    assert [[color(image) for image in row] for row in done] == [[of_file(2)], [of_file(2)]]
    assert of_file(2) != of_file(1)


def test_in_parquet_files(seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes, alone or beside the path that they had elsewhere: a file of that name here is another one."""
    images_in(tmp_path, 3)
    monkeypatch.chdir(tmp_path)
    one, two = ((tmp_path / name).read_bytes() for name in ("1.png", "2.png"))
    stored = [{"bytes": one, "path": "0.png"}, {"bytes": two, "path": None}, {"bytes": None, "path": "0.png"}]
    done = prepared(parquet(tmp_path / "a.parquet", stored, STORED), seeing, tmp_path)
    assert [color(image) for (image,) in done] == [of_file(1), of_file(2), of_file(0)]
    done = prepared(parquet(tmp_path / "b.parquet", [one, two], pa.binary()), seeing, tmp_path)
    assert [color(image) for (image,) in done] == [of_file(1), of_file(2)]


def test_as_datasets_writes_them(seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several a row; from a file, and through `load_dataset`, which would give images of PIL's, decoded all at once."""
    names = [str(tmp_path / name) for name in images_in(tmp_path, 3)]
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]}
    features = datasets.Features({"messages": datasets.Json(), "images": datasets.List(datasets.Image())})
    columns = {"messages": [[message, ANSWER]] * 2, "images": [names[:2], [names[2], names[0]]]}
    data = datasets.Dataset.from_dict(columns, features=features)
    (tmp_path / "set").mkdir()
    file = tmp_path / "set/train.parquet"
    data.to_parquet(file)
    wanted = [[of_file(0), of_file(1)], [of_file(2), of_file(0)]]
    assert [[color(image) for image in row] for row in prepared(file, seeing, tmp_path)] == wanted
    monkeypatch.setitem(sources.KNOWN_DATASETS, "pictures", str(tmp_path / "set"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = training_and_evaluation(settings_of("pictures", seeing, tmp_path), sees=True)[0]
    assert all(isinstance(image, (str, bytes)) for row in rows.rows for image in row["images"])
    assert [[color(image) for image in row] for row in prepared("pictures", seeing, tmp_path)] == wanted


def test_as_images_of_pil(seeing: Path, tmp_path: Path) -> None:
    images_in(tmp_path, 2)
    (tmp_path / "0.jsonl").write_text("{}")
    palette = Image.open(tmp_path / "1.png").quantize()
    rows = [{"messages": ASKED, "images": [image]} for image in (Image.open(tmp_path / "0.png"), palette)]
    keys = settings_of(tmp_path / "0.jsonl", seeing, tmp_path).run
    done = collated(Rows([with_images(row, tmp_path) for row in rows]), keys)
    assert [color(image) for (image,) in done] == [of_file(0), of_file(1)]


def test_damaged_bytes_name_file_and_row(seeing: Path, tmp_path: Path) -> None:
    images_in(tmp_path, 1)
    stored = [{"bytes": (tmp_path / "0.png").read_bytes(), "path": None}, {"bytes": b"no image", "path": "0.png"}]
    file = parquet(tmp_path / "a.parquet", stored, STORED)
    with pytest.raises(KTAMXConfigError) as error:
        prepared(file, seeing, tmp_path)
    assert f"{file} row 2: image 1 of it cannot be opened: PIL knows no such file, or it is damaged" in str(error.value)


def test_order_of_images(tmp_path: Path) -> None:
    """Parts and placeholders of several messages take the images in turn."""
    images_in(tmp_path, 3)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and <image>"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "image", "path": "1.png"}, {"type": "text", "text": "c"}]},
    ]
    done = with_images({"messages": messages, "images": ["2.png", "0.png"]}, tmp_path)
    assert [Path(image).name for image in done["images"]] == ["2.png", "0.png", "1.png"]
    assert parts_of("a<image><image>b") == [
        {"type": "text", "text": "a"}, {"type": "image"}, {"type": "image"}, {"type": "text", "text": "b"}
    ]  # fmt: skip
    with pytest.raises(BadRow, match="int, which is no image"):
        with_images({"messages": messages, "images": [3]}, tmp_path)
