"""Rows with images, as TRL's collator for models that see takes them.

Each row becomes a prompt and its last answer, which alone is trained; the images stay files until their batch is made.
Every row goes through that collator once before the model is loaded, so that none fails in the middle of the training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import KTAMXConfigError
from ..config.settings import RunKeys
from .images import parts_of
from .messages import BadRow, Message
from .rows import Rows, judge
from .template import conversation
from .tokens import Prepared

_SHOWN = 3
_MASKED = -100
# Settings of TRL that its collator for images refuses, after the model is loaded.
_REFUSED = {
    "packing": "rows with images cannot be packed", "padding_free": "rows with images need padding",
    "assistant_only_loss": "of a row with images the last answer is trained", "pad_to_multiple_of": "TRL has no such "
    "padding for images",
}  # fmt: skip
# Of a row, what the collator does not give to the chat template.
_UNTOLD = ("tools", "chat_template_kwargs")


def check_options(keys: RunKeys, options: dict[str, Any]) -> None:
    """Refuse settings that do not go with images.

    Raises:
        KTAMXConfigError: Naming the setting.
    """
    if keys.stage != "sft":
        raise KTAMXConfigError(f"stage={keys.stage}: rows with images are trained with stage: sft.")
    for key, why in _REFUSED.items():
        if options.get(key):
            raise KTAMXConfigError(f"{key}={options[key]!r}: {why}. Leave it out.")
    if options.get("completion_only_loss") is False:
        raise KTAMXConfigError(
            "completion_only_loss=False: of a row with images the last answer is trained. Leave it out."
        )
    if keys.enable_thinking is not None:
        raise KTAMXConfigError(
            f"enable_thinking={keys.enable_thinking}: TRL gives the chat template of a row with images no settings. "
            "Leave it out."
        )
    if options.get("truncation_mode") == "keep_end" and options.get("max_length", 1024) is not None:
        raise KTAMXConfigError("truncation_mode='keep_end': an image cannot be cut. Leave it out.")


def prepare_vision(rows: Rows, processor: Any, max_length: int | None, vocabulary: int, purpose: str) -> Prepared:
    """The rows for TRL's trainer of a model that sees, without those that cannot be trained on.

    Args:
        rows: In TRL's form, conversations; `images` where a row has some.
        processor: The model's.
        max_length: Tokens of a row, those of its images among them; None for any number.
        vocabulary: Ids from here on have no embedding.
        purpose: `train` or `eval`, for messages.

    Raises:
        KTAMXConfigError: More than 1 % of the rows cannot be trained on.
    """
    from datasets import Dataset, Features, Image, Json, List

    name = "the training data" if purpose == "train" else "the evaluation data"
    bad: list[tuple[str, str]] = []
    good: list[dict[str, Any]] = []
    sequences: list[list[int]] = []
    several = 0
    tokens = _collator(processor)
    for index, row in enumerate(rows.rows):
        try:
            asked = _asked(row)
            ids = _token_ids(asked, tokens, vocabulary)
            if max_length is not None and len(ids) > max_length:
                raise BadRow(
                    f"it has {len(ids)} tokens with its images, and an image cannot be cut: max_length={max_length}"
                )
        except BadRow as error:
            bad.append((rows.place(index), str(error)))
            continue
        several += sum(message["role"] == "assistant" for message in conversation(row)) > 1
        good.append(asked)
        sequences.append(ids)
    judge(name, bad, len(rows.rows))
    features = Features({"prompt": Json(), "completion": Json(), "images": List(Image())})
    columns = {column: [row[column] for row in good] for column in features}
    notes = [f"{name}: {len(bad)} rows are left out ({'; '.join(map(': '.join, bad[:_SHOWN]))})"] if bad else []
    if several:
        notes.append(f"{name}: in {several} conversations with images only the last answer is trained")
    return Prepared(Dataset.from_dict(columns, features=features), notes, sequences[:64])


def example(data: Prepared) -> Any:
    """The first row as text alone, to try settings out on a model that does not see."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [data.sequences[0]], "labels": [data.sequences[0]]})


def _collator(processor: Any) -> Any:
    """TRL's, which makes tensors of rows as they will be in the training; nothing is cut."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    return DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)


def _asked(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the collator takes it: everything up to the last answer, that answer, and the images."""
    if "prompt" not in row and "messages" not in row:
        raise BadRow("it is no conversation, and a model that sees is trained on those")
    if lost := [column for column in _UNTOLD if row.get(column)]:
        raise BadRow(f"it has {' and '.join(lost)}, which TRL does not give to the chat template of a row with images")
    messages = conversation(row)
    if messages[-1].get("train") is False:
        raise BadRow("its last answer is not to be trained, and of a row with images no other can be")
    return {"prompt": _parts(messages[:-1]), "completion": _parts(messages[-1:]), "images": row.get("images", [])}


def _token_ids(row: dict[str, Any], collator: Any, vocabulary: int) -> list[int]:
    """A row's tokens, its images' among them."""
    images = [_opened(image, number) for number, image in enumerate(row["images"], 1)]
    try:
        batch = collator([row | {"images": images}])
    except Exception as error:  # whatever TRL, the processor, its template or an image of a strange kind raises
        raise BadRow(f"the processor refuses it: {' '.join(str(error).split())[:300]}") from None
    ids: list[int] = batch["input_ids"][0].tolist()
    if max(ids) >= vocabulary:
        raise BadRow(f"token {max(ids)} is none of the model's {vocabulary}: are model and processor a pair?")
    if not (batch["labels"] != _MASKED).any():
        raise BadRow("its answer has no tokens")
    return ids


def _parts(messages: Sequence[Message]) -> list[Message]:
    hidden = ("train",)
    return [
        {**{key: value for key, value in m.items() if key not in hidden}, "content": parts_of(m["content"])}
        for m in messages
    ]


def _opened(image: Any, number: int) -> Any:
    """An image in memory, as the data set will give it to the collator."""
    from datasets import Image

    feature = Image()
    try:
        return feature.decode_example(feature.encode_example(image))
    except Exception as error:  # of PIL's, and of whatever codec the file needs
        path = isinstance(image, str)
        name = f"the image {image}" if path else f"image {number} of it"
        why = f": {error}" if path else ": PIL knows no such file, or it is damaged"
        raise BadRow(f"{name} cannot be opened{why}") from None
