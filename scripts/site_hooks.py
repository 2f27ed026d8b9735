"""What the site's build does to each page: puts in what is made from the code, and turns links that leave docs/."""

from __future__ import annotations

import importlib.util
import posixpath
import re
from pathlib import Path
from typing import Any

_GENERATED = re.compile(r"<!-- generated: ([\w-]+) -->")
_NEEDS = re.compile(r"^<!-- needs: (.*) -->$", re.MULTILINE)
_COMMENT = re.compile(r"^<!--.*?-->\n", re.MULTILINE)
_LINK = re.compile(r"\[([^\]\n]*)\]\((\.\./[^)\s]+)\)")


def _parts() -> dict[str, Any]:
    # By its file: the folder scripts/ is no package, and MkDocs runs a hook from wherever it was started.
    file = Path(__file__).with_name("reference_pages.py")
    spec = importlib.util.spec_from_file_location("reference_pages", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PARTS


def outside(page: str, link: str) -> str | None:
    """The path in the repository of a link that leaves docs/; None for one that stays."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The page as it is built.

    Raises:
        KeyError: The page asks for a generated part that there is not.
    """

    def link(match: re.Match[str]) -> str:
        path = outside(page.file.src_uri, match[2])
        if path is None:
            return match[0]
        return f"[{match[1]}]({config.repo_url.rstrip('/')}/blob/main/{path})" if config.repo_url else f"`{path}`"

    if _GENERATED.search(markdown):
        parts = _parts()
        markdown = _GENERATED.sub(lambda name: parts[name[1]](), markdown)
    markdown = _NEEDS.sub(lambda needs: f"*Needs {needs[1]}.*\n", markdown)
    # Python-Markdown takes what follows a comment for HTML: a table below one would stay text.
    markdown = _COMMENT.sub("", markdown)
    return _LINK.sub(link, markdown)
