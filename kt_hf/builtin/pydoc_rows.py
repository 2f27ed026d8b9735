"""Questions and answers about Python's standard library, made at run time from its own docstrings.

An item is (name, signature, first paragraph of the docstring). The answer to "What does Python's `textwrap.dedent` do?"
is "`textwrap.dedent(text)`: Remove any common leading whitespace from every line in `text`."

The same Python gives the same items in the same order. Items are held out by a hash of the last part of their name, so
that `os.path.join` is never trained on while `posixpath.join` is held out, and no paragraph occurs twice.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

# Imported without printing, opening a window, a file or a connection. No `this`, `antigravity`, `idlelib`, `tkinter`,
# and nothing that warns of its coming removal.
_NAMES = """
abc argparse array ast base64 bdb bisect builtins bz2 calendar cmath cmd code codecs codeop collections
collections.abc colorsys compileall concurrent.futures configparser contextlib contextvars copy copyreg csv
dataclasses datetime decimal difflib dis doctest email.header email.headerregistry email.message email.policy
email.utils enum errno filecmp fileinput fnmatch fractions ftplib functools gc getopt getpass gettext glob graphlib
gzip hashlib heapq hmac html html.parser http http.client http.cookiejar http.cookies http.server imaplib
importlib.metadata importlib.resources importlib.util inspect io ipaddress itertools json keyword linecache locale
logging logging.config logging.handlers lzma mailbox marshal math mimetypes modulefinder netrc numbers operator
optparse os os.path pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint profile pstats py_compile
pyclbr queue quopri random re reprlib runpy sched secrets selectors shelve shlex shutil signal smtplib socket
socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable sys sysconfig tabnanny tarfile
tempfile textwrap threading time timeit token tokenize trace traceback tracemalloc types typing unicodedata unittest
unittest.mock urllib.error urllib.parse urllib.request urllib.robotparser uuid venv warnings wave weakref webbrowser
xml.dom.minidom xml.etree.ElementTree xml.sax.handler xml.sax.saxutils xmlrpc.client xmlrpc.server zipapp zipfile
zipimport zlib zoneinfo
"""
MODULES = tuple(_NAMES.split())

# Where people know a module's contents from: the accelerator _heapq is accepted in heapq as well.
SHOWN_AS = {"builtins": "", "posix": "os", "nt": "os", "posixpath": "os.path", "ntpath": "os.path"}

# What PyTorch replaces when it is imported: the items shall not depend on what else a process imports.
REPLACED = ("inspect.getfile",)

MIN_CHARS, MAX_CHARS = 24, 240  # of a paragraph
MAX_SIGNATURE = 72  # characters


@dataclass(frozen=True)
class Item:
    """One documented function, class or method.

    Attributes:
        name: Dotted.
        signature: With its parentheses, without annotations.
        paragraph: The first one of the docstring, on one line.
    """

    name: str
    signature: str
    paragraph: str

    @property
    def question(self) -> str:
        """What a user asks about it."""
        return f"What does Python's `{self.name}` do?"

    @property
    def answer(self) -> str:
        """Signature and paragraph, as the model is to answer."""
        return f"`{self.name}{self.signature}`: {self.paragraph}"

    def row(self) -> dict[str, list[dict[str, str]]]:
        """Conversational prompt and completion: TRL computes the loss on the completion only."""
        return {
            "prompt": [{"role": "user", "content": self.question}],
            "completion": [{"role": "assistant", "content": self.answer}],
        }


def import_modules(names: Sequence[str] = MODULES) -> tuple[list[ModuleType], list[str]]:
    """Import modules of the standard library, without their warnings.

    Returns:
        The modules, and the names of those that this Python lacks: some builds and platforms come without a few.
    """
    modules: list[ModuleType] = []
    missing: list[str] = []
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                modules.append(importlib.import_module(name))
        except ImportError:
            missing.append(name)
    return modules, missing


def first_paragraph(doc: str | None) -> str | None:
    """The first paragraph on one line, or None where it is not a plain sentence of a sensible length."""
    if not doc:
        return None
    text = " ".join(re.split(r"\n\s*\n", inspect.cleandoc(doc), maxsplit=1)[0].split())
    plain = re.match(r"[A-Z][a-z]*[ ,]", text) and text.endswith(".") and ">>>" not in text and "--" not in text
    return text if plain and MIN_CHARS <= len(text) <= MAX_CHARS else None


def short_signature(obj: Any, drop_self: bool) -> str | None:
    """A signature in one line, without annotations.

    Args:
        obj: A function, class or method.
        drop_self: Whether to leave out the first parameter.

    Returns:
        None where it is unknown, long or not the same in every process.
    """
    try:
        signature = inspect.signature(obj)
    except (ValueError, TypeError):  # many builtins do not tell
        return None
    parameters = list(signature.parameters.values())[1 if drop_self else 0 :]
    parameters = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    text = str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    # "<" stands for an object's repr, which holds its address; braces for a set, whose order changes; "/home" …
    varies = any(mark in text for mark in ("<", "{", "frozenset(", "\\", "'/"))
    return None if varies or len(text) > MAX_SIGNATURE else text


def _documented(module: ModuleType) -> Iterator[tuple[str, Any, bool]]:
    """(dotted name, object, whether its first parameter is self) of a module's public functions, classes, methods."""
    home = module.__name__
    for name, obj in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isclass(obj) or inspect.isroutine(obj)):
            continue
        if name.endswith(("hook", "set_trace")):  # sys.excepthook and the like: other programs put their own there
            continue
        native = home in (obj.__module__, (obj.__module__ or "").removeprefix("_"), SHOWN_AS.get(obj.__module__ or ""))
        if not native or obj.__name__ != name:
            continue  # imported from elsewhere, or a second name
        shown = SHOWN_AS.get(home, home)
        dotted = f"{shown}.{name}" if shown else name
        yield dotted, obj, False
        if inspect.isclass(obj):
            for method_name, method in sorted(vars(obj).items()):
                is_method = inspect.isfunction(method) or inspect.ismethoddescriptor(method)
                if (
                    is_method
                    and not method_name.startswith("_")
                    and not isinstance(method, (classmethod, staticmethod))
                ):
                    yield f"{dotted}.{method_name}", method, True


def collect(modules: Sequence[ModuleType]) -> list[Item]:
    """The modules' items, ordered by name; of equal paragraphs only the first stays."""
    items: dict[str, Item] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # typing.io and typing.re give one when looked at
        for module in modules:
            for name, obj, is_method in _documented(module):
                if name in REPLACED:
                    continue
                paragraph = first_paragraph(obj.__doc__)
                signature = short_signature(obj, drop_self=is_method) if paragraph else None
                if paragraph and signature:
                    items.setdefault(name, Item(name, signature, paragraph))
    unique: dict[str, Item] = {}
    for _, item in sorted(items.items()):
        unique.setdefault(re.sub(r"[^a-z0-9]", "", item.paragraph.lower()), item)
    return list(unique.values())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Hold out about a tenth of the items.

    Returns:
        The training items and the held-out ones, both shuffled, always in the same way.
    """
    shuffled = sorted(items, key=lambda item: _hash(item.name))
    held_out = [item for item in shuffled if _is_held_out(item)]
    return [item for item in shuffled if not _is_held_out(item)], held_out


def _is_held_out(item: Item) -> bool:
    return _hash("split " + item.name.rpartition(".")[2].lower()) % 10 == 0
