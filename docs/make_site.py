"""Build the documentation site into site/: pages of docs/, and those that are made of the code.

python docs/make_site.py

It needs no network. A link or an anchor that leads nowhere, a page that is in no navigation, and a page of the
navigation that is not there stop it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, get_args

from check_site import faults
from class_pages import codec_page, method_pages, router_page
from command_pages import command_pages, man_page
from reference_pages import CALLS, ERRORS, places, reference_pages

from twinmerge import __version__

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
WORK = ROOT / "build" / "site"
SITE = ROOT / "site"
ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages at the top of the repository -> where they are in the site."""
COPIED = {".md", ".png", ".svg", ".css", ".jpg", ".gif", ".txt", ".yaml", ".yml", ".json"}
PICTURE = re.compile(r'\b(src|srcset)="([^"\s]+)"')
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def sources() -> dict[str, Path]:
    """Path in the site's sources -> file of the repository."""
    found = {place: ROOT / name for name, place in ELSEWHERE.items() if (ROOT / name).is_file()}
    for path in sorted(DOCS.rglob("*")):
        if path.is_file() and path.suffix in COPIED:
            found[path.relative_to(DOCS).as_posix()] = path
    return found


def generated(run: bool = True) -> dict[str, str]:
    """Path in the site's sources -> text of the pages that are made of the code, and of notebooks.

    Args:
        run: run the notebooks; else their pages have no outputs.
    """
    from methods_page import page

    methods = re.sub(r"^\| `(\w+)` \|", r"| [`\1`](methods/\1.md) |", page(), flags=re.MULTILINE)
    made = {"methods.md": methods, "routers.md": router_page(), "codecs.md": codec_page()}
    return {**made, **method_pages(), **command_pages(), **reference_pages(), **notebook_pages(run)}


def notebook_pages(run: bool) -> dict[str, str]:
    """Path in the site's sources -> page of a notebook, of all in docs/notebooks."""
    found = {}
    for file in sorted((DOCS / "notebooks").glob("*.ipynb")):
        from notebooks import executed, page

        book = executed(file) if run else json.loads(file.read_text(encoding="utf-8"))
        found[f"notebooks/{file.stem}.md"] = page(book, file.stem)
    return found


def relinked(text: str, source: Path, place: str, there: dict[str, Path]) -> str:
    """A page with its links as they are in the site; a file that is not in the site is named without a link."""
    places_of = {path.resolve(): name for name, path in there.items()}

    def moved(file: Path) -> str:
        return os.path.relpath(places_of[file], Path(place).parent).replace(os.sep, "/")

    def one(match: re.Match[str]) -> str:
        mark, said, target = match.groups()
        path, hash_, fragment = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        file = (source.parent / path).resolve()
        if file not in places_of:
            return said if file.exists() and not mark else match[0]
        return f"{mark}[{said}]({moved(file)}{hash_}{fragment})"

    def picture(match: re.Match[str]) -> str:
        file = (source.parent / match[2]).resolve()
        return f'{match[1]}="{moved(file)}"' if file in places_of else match[0]

    parts = re.split(r"(^```.*?^```|`[^`\n]+`(?!\]))", text, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [PICTURE.sub(picture, LINK.sub(one, part)) for part in parts[::2]]
    return "".join(parts)


def stage(run: bool = True) -> None:
    """Write all that Zensical reads into build/site.

    Args:
        run: as in `generated`.
    """
    shutil.rmtree(WORK, ignore_errors=True)
    there, made = sources(), generated(run)
    for place, path in there.items():
        out = WORK / "docs" / place
        out.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            out.write_text(relinked(path.read_text(encoding="utf-8"), path, place, there), encoding="utf-8")
        else:
            shutil.copyfile(path, out)
    for place, text in made.items():
        out = WORK / "docs" / place
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    (WORK / "docs" / "twinmerge.1").write_text(man_page(__version__, date.today().isoformat()), encoding="utf-8")
    config = (DOCS / "zensical.toml").read_text(encoding="utf-8")
    for pattern, lines in expansions(made).items():
        config = config.replace(toml(pattern), lines)
    (WORK / "zensical.toml").write_text(config, encoding="utf-8")
    check_navigation(config)


def expansions(made: dict[str, str]) -> dict[str, str]:
    """What stands for the pages that are made of the code in the navigation, as TOML."""
    from twinmerge.methods.kit.base import Group
    from twinmerge.methods.kit.listing import list_methods

    about = list_methods()
    methods: list[Any] = []
    for group in get_args(Group):
        names = [name for name, each in about.items() if each["group"] == group and f"methods/{name}.md" in made]
        if names:
            methods.append({group.capitalize(): [{name: f"methods/{name}.md"} for name in names]})
    commands, notebooks = ([place for place in made if place.startswith(f"{of}/")] for of in ("commands", "notebooks"))
    classes = {page: name for name, page in places().items() if page not in (CALLS, ERRORS)}
    titles = {CALLS: "Calls", **classes, ERRORS: "Errors"}
    reference: list[Any] = [
        {"Reference": ["reference/index.md", *({t: f"reference/{p}.md"} for p, t in titles.items())]}
    ]
    return {
        "methods/*": ", ".join(map(toml, methods)),
        "commands/*": toml([each if "index" in each else {Path(each).stem: each} for each in commands]),
        "reference/*": ", ".join(map(toml, reference)),
        "notebooks/*": toml(notebooks),
        "src/*": toml(str(ROOT / "src")),
        "docs/griffe_docstrings.py": toml(str(DOCS / "griffe_docstrings.py")),
    }


def toml(value: Any) -> str:
    """A list, a mapping or a text as TOML on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def pages_of(nav: Any) -> Iterator[str]:
    """The pages of a navigation."""
    if isinstance(nav, str):
        yield nav
    else:
        for each in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(each)


def check_navigation(config: str) -> None:
    """Stop where the navigation and the pages are not the same."""
    named = set(pages_of(tomllib.loads(config)["project"]["nav"]))
    there = {path.relative_to(WORK / "docs").as_posix() for path in (WORK / "docs").rglob("*.md")}
    wrong = [f"{page} is in no navigation: add it to nav in docs/zensical.toml" for page in sorted(there - named)]
    wrong += [f"{page} is in nav of docs/zensical.toml, and there is no such page" for page in sorted(named - there)]
    if wrong:
        raise SystemExit("\n".join(wrong))


def main(run: bool = True) -> None:
    """Stage, build, check, and put the site in its place.

    Args:
        run: as in `generated`.
    """
    stage(run)
    words = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    done = subprocess.run(words, cwd=WORK, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout.partition("Traceback")[0].strip())
    if done.returncode:
        raise SystemExit(f"Zensical stopped: {done.stdout.strip().splitlines()[-1]}")
    if wrong := faults(WORK / "site"):
        raise SystemExit("\n".join(wrong))
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(WORK / "site", SITE)
    print(f"{len(list(SITE.rglob('*.html')))} pages -> {SITE / 'index.html'}; man page -> {SITE / 'twinmerge.1'}")


if __name__ == "__main__":
    main()
