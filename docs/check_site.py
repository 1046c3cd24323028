"""Look through a built site: every link and anchor leads somewhere, and nothing is fetched from elsewhere.

python docs/check_site.py site
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("use", "href")}
NO_FETCH = {"canonical", "next", "prev", "alternate", "edit"}


class Page(HTMLParser):
    """What a page links, what it fetches, and the anchors in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        for name in ("href", "src"):
            if name in given:
                only_said = tag == "link" and set(given.get("rel", "").split()) & NO_FETCH
                fetched = (tag, name) in FETCHED and not only_said
                (self.fetched if fetched else self.links).append(given[name])


def faults(site: Path) -> list[str]:
    """What is wrong, a sentence each."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site} has no page"]
    for path, page in pages.items():
        name = path.relative_to(site)
        for target in page.fetched:
            if urlsplit(target).netloc:
                found.append(f"{name} fetches {target}")
        for target in {*page.links, *page.fetched}:
            if (said := _broken(target, path, site, pages)) is not None:
                found.append(f"{name}: {target} {said}")
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8", errors="replace")
        found += [
            f"{style.relative_to(site)} fetches {url}" for url in re.findall(r"url\(['\"]?((?:https?:)?//[^)]+)", text)
        ]
        found += [
            f"{style.relative_to(site)} imports {url}" for url in re.findall(r"@import\s+['\"](https?://[^'\"]+)", text)
        ]
    return sorted(found)


def _broken(target: str, path: Path, site: Path, pages: dict[Path, Page]) -> str | None:
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return None
    file = path
    if parts.path:
        start = site if parts.path.startswith("/") else path.parent
        file = (start / unquote(parts.path).lstrip("/")).resolve()
        if file.is_dir():
            file /= "index.html"
        if not file.is_file():
            return "leads nowhere"
        if not file.is_relative_to(site.resolve()):
            return "leads out of the site"
    if parts.fragment and file.suffix == ".html":
        page = pages.get(file) or pages.get(site / file.relative_to(site.resolve()))
        if page is not None and unquote(parts.fragment) not in page.anchors:
            return "has no such anchor"
    return None


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]))
    print("\n".join(wrong), file=sys.stderr)
    sys.exit(bool(wrong))
