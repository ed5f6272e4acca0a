"""What mkdocs must be told about this repository: its pages link to files outside of docs/, which come along.

README.md becomes the first page, other Markdown files a page at their own path, a folder a page that lists its files;
any other file is copied. A link to a file that does not exist is left as it is; mkdocs then fails (`strict`).
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_config(config: Any) -> Any:
    """Headings in any language get an anchor that is their text, as on GitHub."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add README and, again and again, what the pages link to outside of docs/."""
    waiting = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.startswith("docs/"):
            files.append(File.generated(config, in_site(path), content=content(path)))
        targets = linked(path) if path.endswith(".md") else inside(path)
        outside = {t for t in targets if (ROOT / t).exists() and not t.startswith("docs/")} - seen
        waiting += sorted(outside)
        seen |= outside
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links between files of the repository become links between pages of the site."""
    here = in_repository(page.file.src_uri)

    def changed(match: re.Match[str]) -> str:
        target = resolve(here, match[2])
        if "://" in match[2] or not (ROOT / target).exists():
            return match[0]
        return (
            match[1]
            + posixpath.relpath(in_site(target), posixpath.dirname(in_site(here)))
            + (match[3] or "")
            + match[4]
        )

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(changed, part) for part in parts)


def inside(path: str) -> set[str]:
    """The files of a folder; none of a file."""
    return {f"{path}/{one.name}" for one in (ROOT / path).glob("*.*")} if (ROOT / path).is_dir() else set()


def content(path: str) -> str | bytes:
    if not (ROOT / path).is_dir():
        return (ROOT / path).read_bytes()
    names = sorted(posixpath.basename(one) for one in inside(path))
    return "\n".join([f"# {path}", "", *(f"* [{name}]({name})" for name in names)])


def linked(path: str) -> set[str]:
    text = _FENCE.sub("", (ROOT / path).read_text(encoding="utf-8"))
    return {resolve(path, match[2]) for match in _LINK.finditer(text) if "://" not in match[2]}


def resolve(page: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def in_site(path: str) -> str:
    """Where a file of the repository lies in the site."""
    if path == "README.md":
        return "index.md"
    return f"{path}/index.md" if (ROOT / path).is_dir() else path.removeprefix("docs/")


def in_repository(uri: str) -> str:
    if uri == "index.md":
        return "README.md"
    return f"docs/{uri}" if (ROOT / "docs" / uri).exists() else uri.removesuffix("/index.md")
