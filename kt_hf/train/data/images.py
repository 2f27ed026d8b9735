"""Rows with images: where each stands in its conversation, and where its file is.

People write them as parts of a message (`{"type": "image", ...}`), or as `<image>` in its text with the files in a
column `images`. Here both become the second: `<image>` in texts, and the row's `images` in that order.

An image is the path of a file, what a file holds (`bytes`, alone or as `{"bytes": …, "path": …}`, which is how datasets
and parquet files have them, or a `data:` address), or an image of PIL's.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .messages import BadRow, keys_of

PLACEHOLDER = "<image>"
_COLUMNS = ("images", "image")
_PARTS = ("image", "image_url", "input_image")
_PAYLOADS = ("image", "image_url", "url", "path")
# Columns of a row that hold messages.
_DIALOGUES = ("messages", "conversations", "prompt", "completion")

Row = dict[str, Any]


def with_images(row: Row, folder: Path | None) -> Row:
    """A row whose messages have `<image>` for each of its images, and the images themselves in the column `images`.

    Args:
        row: As it was read.
        folder: Where relative paths begin: that of the data's file. What is not there may be where the program runs.

    Returns:
        The row; the same one if it has no images. An image is the path of a file, `bytes`, or an image of PIL's.

    Raises:
        BadRow: As many placeholders as images are needed; or an image's file is not there.
    """
    given = [image for column in _COLUMNS for image in _listed(row.get(column), column)]
    dialogues = {c: row[c] for c in _DIALOGUES if isinstance(row.get(c), list) and row[c]}
    if not given and not any(_has_images(messages) for messages in dialogues.values()):
        return row
    if not dialogues:
        raise BadRow("it has images and no messages: give messages, conversations, or prompt and completion")
    rest, taken = iter(given), list[Any]()
    changed = {c: [_message(m, keys_of(ms)[1], rest, taken, len(given)) for m in ms] for c, ms in dialogues.items()}
    left = len(list(rest))
    if left and taken:
        raise BadRow(f"it has {len(given)} images and {len(given) - left} {PLACEHOLDER} in its messages")
    if left:  # as TRL has it: before the first question
        taken = given
        _put_first(changed, left)
    images = [_found(image, folder) for image in taken]
    return {key: value for key, value in row.items() if key not in _COLUMNS} | changed | {"images": images}


def parts_of(text: str) -> list[dict[str, str]]:
    """A message's text as the parts that processors take: texts, and an image for each placeholder."""
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(text.split(PLACEHOLDER)):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _listed(value: Any, column: str) -> list[Any]:
    if value is None or value == "":
        return []
    images = value if isinstance(value, list) else [value]
    for image in images:
        if not (isinstance(image, (str, bytes, dict)) or hasattr(image, "size")):
            raise BadRow(f"{column} has {type(image).__name__}, which is no image and no path of one")
    return images


def _has_images(messages: list[Any]) -> bool:
    contents = [m.get(keys_of(messages)[1]) for m in messages if isinstance(m, dict)]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    return any(_is_image(part) or (isinstance(part, str) and PLACEHOLDER in part) for part in parts)


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _PARTS


def _message(message: Any, key: str, rest: Iterator[Any], taken: list[Any], given: int) -> Any:
    """A message with placeholders for its images, which are moved to `taken`."""
    if not isinstance(message, dict):
        return message
    content = message.get(key)
    if isinstance(content, str):
        _take(content.count(PLACEHOLDER), rest, taken, given)
        return message
    if not isinstance(content, list):
        return message
    parts = []
    for part in content:
        if not _is_image(part):
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                _take(text.count(PLACEHOLDER), rest, taken, given)
            parts.append(part)
            continue
        payload = next((part[name] for name in _PAYLOADS if part.get(name) is not None), None)
        payload = payload.get("url", payload) if isinstance(payload, dict) else payload
        if payload is None:
            _take(1, rest, taken, given)
        else:
            taken.append(payload)
        parts.append({"type": "text", "text": PLACEHOLDER})
    return message | {key: parts}


def _take(count: int, rest: Iterator[Any], taken: list[Any], given: int) -> None:
    for _ in range(count):
        image = next(rest, None)
        if image is None:
            raise BadRow(f"its messages have more {PLACEHOLDER} than the {given} images it has")
        taken.append(image)


def _put_first(dialogues: dict[str, list[Any]], count: int) -> None:
    for messages in dialogues.values():
        role, key = ("from", "value") if keys_of(messages)[0] == "from" else ("role", "content")
        for index, message in enumerate(messages):
            if isinstance(message, dict) and message.get(role) in ("user", "human"):
                text = message.get(key)
                marks = PLACEHOLDER * count
                text = [{"type": "text", "text": marks}, *text] if isinstance(text, list) else f"{marks}{text or ''}"
                messages[index] = message | {key: text}
                return
    raise BadRow("it has images and no question to put them before")


def _found(image: Any, folder: Path | None) -> Any:
    if isinstance(image, dict):
        # Not its path where the bytes are there: that is a name of elsewhere, and another file may have it here.
        image = image["bytes"] if image.get("bytes") else image.get("path")
        if image is None:
            raise BadRow("an image of it has neither bytes nor a path")
    if not isinstance(image, str):
        return image
    if image.startswith("data:"):
        return _decoded(image)
    image = image.removeprefix("file://")
    if "://" in image:
        raise BadRow(f"the image {image[:60]!r} is no file: download it, and give its path")
    path = Path(image).expanduser()
    for place in (*([folder / path] if folder else []), path):
        if place.is_file():
            return str(place)
    where = f" (looked for in {folder} too)" if folder and not path.is_absolute() else ""
    raise BadRow(f"there is no image {image!r}{where}")


def _decoded(address: str) -> bytes:
    kind, _, content = address.partition(",")
    try:
        if kind.endswith(";base64"):
            return base64.b64decode(content, validate=True)
    except ValueError:
        pass
    raise BadRow(f"the image {address[:40]!r} is not base64: write data:image/png;base64,… or the path of a file")
