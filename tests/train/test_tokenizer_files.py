"""A model's folder without a tokenizer, or with one that makes no tokens, is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig

from kt_hf.errors import KTAMXConfigError
from kt_hf.train.config.settings import RunKeys
from kt_hf.train.models import load_config, load_tokenizer
from tests.support import tiny


def load(folder: Path) -> tuple[PreTrainedTokenizerFast, list[str]]:
    return load_tokenizer(RunKeys(model_name_or_path=str(folder)), chat=False)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def remove_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def test_the_files_are_missing(folder: Path) -> None:
    assert load(folder)[0]("a")["input_ids"]
    remove_tokenizer(folder)
    with pytest.raises(KTAMXConfigError, match="tokenizer"):
        load(folder)


def test_transformers_makes_an_empty_one(folder: Path) -> None:
    """Of the families whose tokenizer class can be made without files, as Qwen's."""
    remove_tokenizer(folder)
    Qwen3MoeConfig().save_pretrained(folder)
    with pytest.raises(KTAMXConfigError, match=r"makes no tokens of .*tokenizer\.json"):
        load(folder)


def test_a_vocabulary_of_special_tokens_alone(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<s>").save_pretrained(folder)
    with pytest.raises(KTAMXConfigError, match="makes no tokens of"):
        load(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 1}', "\0"])
def test_damaged_files(content: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(KTAMXConfigError, match="tokenizer"):
        load(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "5", "{}", '{"model_type": 5}', '{"model_type": "mixtral", "hidden_size": "x"}']
)
def test_a_damaged_config(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(KTAMXConfigError, match="model_name_or_path="):
        load_config(RunKeys(model_name_or_path=str(folder)))


def test_the_tiny_models_are_whole(folder: Path) -> None:
    assert load(folder)[0].chat_template == tiny.CHAT
