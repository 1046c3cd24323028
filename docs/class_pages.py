"""Pages that are made of classes: one for every method, one for all routers, one for all codecs.

`docs/make_site.py` writes them at the build; they are in no commit.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import parameter_rows
from formula import mathematics

from twinmerge.methods.kit.base import Method
from twinmerge.methods.kit.listing import list_methods, source_of
from twinmerge.methods.kit.registry import METHODS, method_class

DOCS = Path(__file__).parent
LAWS = {
    "idempotent": "Experts that are all equal give exactly that expert, to the bit{scale}.",
    "symmetric": "The order of the experts does not matter, to {close} of each number.",
    "odd": "From a base of zeros, negated changes give the negated result, to {close} of each number.",
    "homogeneous": "From a base of zeros, changes times 2 give twice the result, to {close} of each number.",
}
SPACES = {
    "deltas": "task vectors τt = θt − θ0, so it needs the base",
    "parameters": "the models θt themselves; no base is needed",
    "either": "task vectors where a base is named, the models themselves where none is",
}
GRAINS = {"element": "entry by entry", "rows": "whole rows", "matrix": "whole matrices"}
MEASURED = ("Every static method and every mask on eight text experts", "The strongest merges without data")


def method_pages() -> dict[str, str]:
    """Path below docs/ -> the page of a method, of all that are files of ours."""
    found = {name: about for name, about in list_methods().items() if name in METHODS.files()}
    return {f"methods/{name}.md": method_page(name, about) for name, about in found.items()}


def method_page(name: str, about: Mapping[str, Any]) -> str:
    """All that is known of a method."""
    cls = method_class(name)
    head, body = said_of(cls)
    lines = [f"# {name}", "", title_of(cls), "", formula_block(head, cls.model_fields), ""]
    if body:
        lines += ["## What it does", "", prose(body, name, cls.model_fields), ""]
    lines += ["## At a glance", "", "| | |", "| --- | --- |", *_glance(name, cls, about), ""]
    lines += ["## Parameters", "", *table_of(parameter_rows.of_method(name, cls)), ""]
    lines += ["## Run it", "", *examples(name, cls), ""]
    if rows := scores(name):
        lines += ["## Measured here", "", *rows, ""]
    lines += ["## Laws", "", *laws(cls), ""]
    lines += ["## Source", "", with_links(source_of(name) or "None."), ""]
    return "\n".join(lines)


def said_of(cls: type) -> tuple[str, str]:
    """The first paragraph of a class's docstring, and the rest of it without source and example."""
    text = (inspect.getdoc(cls) or "").split("\nExample:")[0]
    text = re.sub(r"^Source: .+?(?:\n\s*\n|\Z)", "", text, flags=re.DOTALL | re.MULTILINE)
    head, _, body = text.strip().partition("\n\n")
    return head, body.strip()


def title_of(cls: type) -> str:
    """The first sentence of the file that a class is in."""
    return (inspect.getdoc(sys.modules[cls.__module__]) or "").partition("\n\n")[0].replace("\n", " ")


def formula_block(text: str, names: Any = ()) -> str:
    """A formula in a place of its own."""
    return f'<p class="formula">{mathematics(text, tuple(names), large=True)}</p>'


def prose(text: str, itself: str = "", names: Any = ()) -> str:
    """Paragraphs and lists of a docstring as Markdown, with the formulas in them drawn; indented lines are formulas."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        if all(line.startswith("    ") for line in paragraph.split("\n")):
            found += [formula_block(line, names) for line in paragraph.split("\n")]
            continue
        items = re.split(r"^(?=\d+\. |- )", paragraph, flags=re.MULTILINE)
        lines = []
        for item in filter(None, items):
            marker = re.match(r"\d+\. |- |", item)
            start = marker[0] if marker else ""
            lines.append(start + _sentence(item[len(start) :], itself, names))
        found.append("\n".join(lines))
    return "\n\n".join(found)


def _sentence(text: str, itself: str, names: Any) -> str:
    """Text of one paragraph; code and links stay what they are."""
    parts = re.split(r"(`[^`]*`|\[[^\]]*\]\([^)]*\))", with_links(linked(" ".join(text.split()), itself)))
    for i in range(0, len(parts), 2):
        drawn = mathematics(parts[i], tuple(names)) if parts[i].strip() else ""
        drawn = re.sub(r"[*_#|\[\]\\]", lambda mark: f"&#{ord(mark[0])};", drawn)
        ends = [" " if parts[i][end : end + 1 or None].isspace() and drawn else "" for end in (0, -1)]
        drawn = re.sub(r"^(<math>.*?</math>)", r"<span>\1</span>", drawn) if i == 0 else drawn  # else it is a block
        parts[i] = f"{ends[0]}{drawn}{ends[1]}" if drawn else parts[i]
    return "".join(parts)


def escaped(text: str) -> str:
    """Marks that Markdown would take for its own, outside of code and links."""
    parts = re.split(r"(`[^`]*`|\[[^\]]*\]\([^)]*\))", text)
    parts[::2] = [re.sub(r"(?<!^)([*_<>#|\[\]])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def linked(text: str, itself: str = "") -> str:
    """Names of methods in code, as links to their pages."""
    known = METHODS.files().keys() - {itself}
    return re.sub(r"`(\w+)`", lambda m: f"[`{m[1]}`]({m[1]}.md)" if m[1] in known else m[0], text)


def with_links(text: str) -> str:
    """Numbers of arXiv as links."""
    return re.sub(r"arXiv\s+(\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def table_of(rows: list[parameter_rows.Parameter]) -> list[str]:
    """Markdown of a table of parameters."""
    if not rows:
        return ["It has none: there is nothing to choose."]
    lines = ["| name | kind | default | allowed | meaning |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        meaning = escaped(row.meaning)
        lines.append(f"| `{row.name}` | {row.kind} | {row.default} | {row.allowed} | {meaning} |")
    return lines


def _glance(name: str, cls: type[Method], about: Mapping[str, Any]) -> list[str]:
    count = cls.experts_min, cls.experts_max
    experts = f"exactly {count[0]}" if count[0] == count[1] else f"{count[0]} or more"
    needs = ", ".join(about["needs"]) or "the models alone"
    rows = {
        "group": f"[{about['group']}](../methods.md#{anchor(about['group'])})",
        "strong for": escaped(about["strong"]),
        "works on": f"{SPACES[cls.space]}; {GRAINS[cls.grain]}",
        "data needed": escaped(needs)
        + ("; no data" if not cls.needs else " ([how to measure](../commands/measure.md))"),
        "experts": experts,
        "cost": about["cost"],
        "gives": "one vector and a mask for each expert" if about["outputs"] == "masks" else "one model",
        "over time": {
            "sum": "yes, as a sum: experts can come and go ([`continual`](../commands/continual.md))",
            "order": "yes, in order: experts can come ([`continual`](../commands/continual.md))",
            None: "no",
        }[about["over_time"]],
        "LoRA adapters": "merged into an adapter, exactly ([`lora merge`](../commands/lora.md))"
        if cls.core_space or cls.linear
        else "as `base+adapter`; into an adapter with `--rank`",
        "LiNeS (`--lines`)": "yes" if cls.scales_last else "no",
    }
    if cls.mergekit:
        rows["name in mergekit"] = (
            ", ".join(f"`{theirs}`" for theirs in cls.mergekit) + " ([keys](../mergekit.md#methods))"
        )
    others = [f"`{alias}`" for alias in cls.aliases]
    if others:
        rows["other names"] = ", ".join(others)
    return [f"| **{key}** | {value} |" for key, value in rows.items()]


def anchor(heading: str) -> str:
    """The anchor that a heading has on the site and on code hosts."""
    kept = re.sub(r"[^\w\- ]", "", heading.lower())
    return kept.replace(" ", "-")


def laws(cls: type[Method]) -> list[str]:
    """The laws that tests hold a method to."""
    if not cls.laws:
        return ["None is declared."]
    close = "10⁻⁵" if cls.grain == "matrix" else "10⁻⁶"
    scale = ", where `scale` is 1" if "scale" in cls.model_fields else ""
    lines = [f"- **{law}**: {text.format(close=close, scale=scale)}" for law, text in LAWS.items() if law in cls.laws]
    return ["The conformance test holds the method to these:", "", *lines]


def scores(name: str) -> list[str]:
    """What docs/quality.md measured of a method: rows of its tables on eight text experts."""
    text = (DOCS / "quality.md").read_text(encoding="utf-8")
    lines: list[str] = []
    for heading in MEASURED:
        section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
        for row in re.findall(rf"^\| ({name}(?: [^|]+)?) \| ([^|]+) \| (.+) \|$", section, re.MULTILINE):
            cells = row[2].split(" | ")
            link = f"[{heading.split(' on ')[0].lower()}](../quality.md#{anchor(heading)})"
            lines.append(f"| {row[0]} | {row[1]} | {' | '.join(cells[:4])} | {link} |")
    if not lines:
        return []
    return [
        "Share of what the experts reach that is kept, in per cent with 95 % intervals, on eight text tasks; the setting was",
        "chosen on validation rows.",
        "",
        "| method | setting | 2 experts | 4 | 6 | 8 | table |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
        *lines,
    ]


# ------------------------------------------------------------------------------------- routers and codecs


def router_page() -> str:
    """All routers on one page."""
    from twinmerge.twin.routers.kit.listing import list_routers
    from twinmerge.twin.routers.kit.registry import ROUTERS, router_class

    lines = [
        "# Routers",
        "",
        "A router says which expert of a [twin](commands/twin.md) an input belongs to. Choose one with",
        "`twinmerge twin build --router NAME`, set its options with `--router-option NAME=VALUE`; from Python it is",
        "`twin.fit_router(inputs, NAME, options={…})`. How to write one is in [CONTRIBUTING](contributing.md#how-to-add-a-router).",
        "",
    ]
    found = {name: about for name, about in list_routers().items() if name in ROUTERS.files()}
    for name, about in found.items():
        cls: Any = router_class(name)
        head, body = said_of(cls)
        options = parameter_rows.of_router(name, cls)
        stays = cls.keeps_statistics or not cls.needs_inputs
        lines += [f"## {name}", "", formula_block(head), "", prose(body, names=[each.name for each in options]), ""]
        lines += ["| | |", "| --- | --- |"]
        lines += [f"| **needs** | {'inputs of every expert' if about['needs_inputs'] else 'no data'} |"]
        reads = "hidden states of the shared model" if about["reads"] == "states" else "each expert's own answer"
        lines += [
            f"| **reads** | {reads} |",
            f"| **experts come and go without a new fit** | {'yes' if stays else 'no'} |",
        ]
        if options:
            lines += ["", *table_of(options)]
        lines += [""]
        lines += [with_links(f"Source: {source}") for source in sources(cls)] + [""]
    return "\n".join(lines)


def sources(cls: type) -> list[str]:
    """What a docstring says at "Source:"."""
    found = re.search(r"^Source: (.+?)(?:\n\s*\n|\Z)", inspect.getdoc(cls) or "", re.DOTALL | re.MULTILINE)
    return [" ".join(found[1].split())] if found else []


def codec_page() -> str:
    """All codecs on one page."""
    from twinmerge.maths.codec import CODECS, slice_bytes

    lines = [
        "# Codecs",
        "",
        "A codec is how the numbers of a twin's exclusive parts are stored: `twinmerge twin build --codec NAME`,",
        "`twinmerge twin compress --codec NAME`. What is read encodes to the same bytes again. How to write one is in",
        "[CONTRIBUTING](contributing.md#how-to-add-a-codec).",
        "",
        "| codec | what it is | bytes of 384 numbers | of 4096 |",
        "| --- | --- | ---: | ---: |",
        f"| `none` | Numbers as they are, here in float32. | {slice_bytes(384, 'none')} | {slice_bytes(4096, 'none')} |",
    ]
    bodies = []
    for name in CODECS.files():
        head, body = said_of(CODECS.find(name))
        lines.append(
            f"| `{name}` | {escaped(' '.join(head.split()))} | {slice_bytes(384, name)} | {slice_bytes(4096, name)} |"
        )
        bodies += [f"`{name}`: {escaped(' '.join(body.split()))}", ""] if body else []
    return "\n".join([*lines, "", *bodies])


# ----------------------------------------------------------------------------------------------- examples


def examples(name: str, cls: type[Method]) -> list[str]:
    """The command and the call that run a method."""
    command, call = command_of(name, cls), call_of(name, cls)
    lines = [
        "```console",
        *[f"$ {line}" for line in command],
        "```",
        "",
        "```python",
        "import twinmerge as tm",
        "",
        *call,
        "```",
    ]
    if cls.outputs == "masks":
        return lines
    if name == "passthrough":
        lines += ["", "Layers of several models are named in a [recipe](../mergekit.md) (`slices`)."]
    return lines


def chosen(cls: type[Method]) -> dict[str, Any]:
    """The parameter that an example shows, with its default."""
    for field in ("density", "scale", "t", "threshold", "ridge", "alpha"):
        if field in cls.model_fields:
            return {field: cls.model_fields[field].default}
    return {}


def command_of(name: str, cls: type[Method]) -> list[str]:
    """The lines to type."""
    experts = parameter_rows.names_of(cls)
    models = [f"--expert {expert}={expert.upper()}" for expert in experts]
    base = ["--base BASE"] if cls.space == "deltas" else []
    given = [f"-p {key}={value:g}" for key, value in chosen(cls).items()]
    if cls.outputs == "masks":
        words = ["twinmerge masks build", f"--method {name}", *base, *models, *given, "-o MASKS"]
        return [*broken(words), f"twinmerge masks extract MASKS {experts[0]} -o MODEL"]
    measured = [
        f"twinmerge measure {need} {expert.upper()} --data {expert}.jsonl -o {expert}.{need}"
        for need in cls.needs
        for expert in experts
    ]
    statistics = [f"--statistics {expert}={expert}.{need}" for need in cls.needs for expert in experts]
    first = ["twinmerge merge", f"--method {name}", *base, *models]
    return [*measured, *broken([*first, *statistics, *given, "-o OUT"])]


def broken(words: list[str], width: int = 72) -> list[str]:
    """A command in lines that are no wider, with what is typed at the end of each."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines[-1] += " \\"
            lines.append("    " + word)
        else:
            lines[-1] = f"{lines[-1]} {word}".lstrip() if len(lines) == 1 else f"{lines[-1]} {word}"
    return ["\n".join(lines)]


def call_of(name: str, cls: type[Method]) -> list[str]:
    """The lines of Python."""
    experts = parameter_rows.names_of(cls)
    models = "{" + ", ".join(f'"{expert}": "{expert.upper()}"' for expert in experts) + "}"
    base = '"BASE"' if cls.space == "deltas" else "None"
    given = "".join(f", {key}={value:g}" for key, value in chosen(cls).items())
    if cls.outputs == "masks":
        return [
            f'tm.build_masks("{name}", {base}, {models}, "MASKS"{given})',
            f'tm.extract_masked("MASKS", "{experts[0]}", "MODEL")',
        ]
    lines = [
        f'tm.measure("{need}", "{expert.upper()}", "{expert}.jsonl", "{expert}.{need}")'
        for need in cls.needs
        for expert in experts
    ]
    files = ", ".join(f'"{expert}": "{expert}.{need}"' for need in cls.needs for expert in experts)
    lines += [f"statistics = {{{files}}}"] if files else []
    statistics = ", statistics=statistics" if files else ""
    return [
        *lines,
        f'merge = tm.merge("{name}", {base}, {models}{statistics}{given})',
        'merge.save("OUT")',
    ]
