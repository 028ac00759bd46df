"""Pages link to files of the repository, as `../examples/…`, for readers of the source; the site shows their names.

Pages that include a file of the root (`CONTRIBUTING.md`, `CHANGELOG.md`) link to it, because hosts of repositories do
not include it. It is included after this hook, unchanged: those files link to nothing outside of themselves.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace links out of docs/ by their text; raise where the file does not exist."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def named(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: {link[2]} does not exist")
        return link[0] if target.is_relative_to(ROOT / "docs") else link[1]

    return LINK.sub(named, markdown)
