"""Hook of MkDocs: README, RESULTS and CHANGELOG become pages of the site.

The documents are read on GitHub too, so their links are those between files of the repository.
Links between documents become links between pages; links to other files, which the site lacks,
become text.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

PAGES = {"README.md": "index.md", "RESULTS.md": "results.md", "CHANGELOG.md": "changelog.md"}
"""Documents outside of `docs/`, and the pages that they become."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def site_links(text: str, folder: str = "") -> str:
    """Replace the links of a document by those between pages of the site.

    Args:
        text: Markdown.
        folder: the document's folder in the repository: ``docs``, or empty.
    """

    def replace(link: re.Match[str]) -> str:
        image, label, target, anchor = link.groups(default="")
        path = _normalised(f"{folder}/{target}" if folder else target)
        page = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        return f"{image}[{label}]({page}{anchor})" if page else label

    return LINK.sub(replace, text)


def _normalised(path: str) -> str:
    """Resolve `..` in a path relative to the repository."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == ".." and parts:
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the documents outside of `docs/`."""
    from mkdocs.structure.files import File

    for document, page in PAGES.items():
        text = site_links((ROOT / document).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(
    markdown: str, page: "Page", config: "MkDocsConfig", files: "Files"
) -> str | None:
    """Adapt the links of a page in `docs/`."""
    if page.file.generated_by or not page.file.src_uri.endswith(".md"):
        return None
    return site_links(markdown, "docs")
