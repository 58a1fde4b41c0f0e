"""Hooks of the documentation site: documents that live beside docs/ become pages, and links between all of them work.

Links are written as they hold in a checkout, where they can be followed on any host. Here they are resolved the same
way: to a page, to a picture, or, for other files of the repository, to no more than their words.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Documents outside docs/ that are pages, under the path that they have in the repository.
PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "bench/NOTES.md",
    "bench/results/finetune_smollm/samples.md",
    "examples/README.md",
    "experiments/NOTES.md",
    "experiments/PROTOCOL.md",
    "experiments/README.md",
    "experiments/results/report.md",
)
#: An inline link or picture outside code: [words](target#anchor).
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
PICTURES = (".png", ".svg")


def of_site(path: str) -> str | None:
    """Return where a file of the repository is in the site, or None."""
    if path.startswith("docs/") and path.endswith((".md", *PICTURES)):
        return path.removeprefix("docs/")
    return path if path in PAGES or path.endswith(PICTURES) else None


def resolved(text: str, source: str) -> str:
    """Return a document's text with its links as they are in the site.

    Args:
        text: In Markdown.
        source: The document's path in the repository.
    """
    here = of_site(source) or source

    def replace(match: re.Match[str]) -> str:
        picture, words, target, anchor = match.groups()
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        found = of_site(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
        if found is None:
            return words
        there = posixpath.relpath(found, posixpath.dirname(here) or ".")
        return f"{picture}[{words}]({there}{anchor or ''})"

    parts = re.split(r"(^```.*?^```|`[^`\n]+`)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else LINK.sub(replace, part) for i, part in enumerate(parts))


def on_files(files: Any, config: Any) -> Any:
    """Add the documents outside docs/, and the pictures that they show."""
    from mkdocs.structure.files import File

    pictures = set()
    for name in (*PAGES, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))):
        text = (ROOT / name).read_text(encoding="utf-8")
        if name in PAGES:
            files.append(File.generated(config, name, content=text))
        for match in LINK.finditer(text):
            if match[1] and match[3].endswith(PICTURES):
                pictures.add(posixpath.normpath(posixpath.join(posixpath.dirname(name), match[3])))
    for name in sorted(name for name in pictures if not name.startswith("docs/")):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Resolve the links of a page."""
    path = page.file.src_uri
    return resolved(markdown, path if path in PAGES else f"docs/{path}")
