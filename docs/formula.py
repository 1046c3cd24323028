"""Formulas of docstrings, which are plain Unicode text, as MathML, which browsers draw without any script.

Nothing is left out, added or moved: without its tags the answer is the text (`tests/test_docs.py` holds that).
What is not understood as mathematics stays text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from html import escape
from typing import NamedTuple

RAISED = {"ᵀ": "T", "²": "2", "³": "3", "⁺": "+", "⁻": "−", "¹": "1", "ᵖ": "p"}
UPRIGHT = {"sin", "cos", "tanh", "log", "exp", "argmin", "argmax", "softmax", "diag", "tr"}
WORDS = frozenset(re.findall(r"\w+", "a an as at be by do go he if in is it me my no of on or so t5 to up us we"))
"""Short words of prose, which are no letter with an index."""
TOKEN = re.compile(
    r"""
    (?P<code>`[^`]+`|\b\w{2,}=(?:"\w*"|[\w.]*\w)|\b\w+/[\w/]*\w\.\w+)
  | (?P<said>"[\w-]+"|\d+-\d+)
  | (?P<number>½|\d+(?:[.,]\d+)*(?:e-?\d+)?(?:⁻[¹²³⁴⁵⁶⁷⁸⁹]+)?)
  | (?P<sum>[Σ∏])(?P<over>[a-z](?![a-z]))?
  | (?P<function>[A-Za-z][A-Za-z_]+)(?=\()|(?P<mean>mean)(?=\ [‖θτ])
  | (?P<letter>[A-Za-zα-ωΑ-Ω][\u0300-\u036f]*′?(?:'(?!s\b))?|[a-z]{2,}(?=_[a-z]\b))
    (?P<index>_[A-Za-z0-9]+|\d+|[a-zTᵢⱼₖ⊥](?![A-Za-z]))?
    (?P<power>[ᵀ²³⁺⁻¹ᵖ]+|\*(?![\w*])|\^[A-Za-z0-9])?
    (?![A-Za-z]|['’]s\b|-[a-z]{2})
  | (?P<word>[A-Za-z][\w'’]*(?:-\w+)*(?:['’]s\b)?)
  | (?P<close>[)\]}⟩⌋⌉‖|])(?=[₀-₉ᵀ²³⁺⁻¹ᵖ^])(?P<lowered>[₀-₉])?(?P<raised>[ᵀ²³⁺⁻¹ᵖ]+|\^[A-Za-z0-9])?
  | (?P<mark>.)
    """,
    re.VERBOSE | re.DOTALL,
)
OPERATORS = set("=+−·⊙/≈≥≤<>∈∼~←→×±√*-⊥∇^")
OPEN, CLOSE = "([{⟨⌊⌈", ")]}⟩⌋⌉"
BARS = "‖|"


class Piece(NamedTuple):
    """A token: its text, what draws it, and what it is: "math", "operator", "bracket", "text" or "stop"."""

    text: str
    drawn: str
    kind: str
    space: bool


def mathematics(text: str, names: Collection[str] = (), large: bool = False) -> str:
    """HTML of a line of formulas and words.

    Args:
        names: words that are parameters in these formulas.
        large: for a line of its own: what a sum goes over stands below it.

    Example:
        >>> mathematics("θ0 by row")
        '<math><msub><mi>θ</mi><mn>0</mn></msub></math> by row'
    """
    opened = '<math displaystyle="true">' if large else "<math>"
    pieces = _decided(_pieces(" ".join(text.split()), names))
    out: list[str] = []
    i = 0
    while i < len(pieces):
        j = i
        while j < len(pieces) and pieces[j].kind != "text":
            j += 1
        if j > i:
            lead = " " if pieces[i].space and out else ""
            drawn = "".join(piece.drawn for piece in pieces[i:j])
            out.append(f"{lead}{opened}{drawn}</math>")
            i = j
        else:
            said = pieces[i]
            shown = said.drawn or escape(said.text, quote=False)
            out.append(f"{' ' if said.space and out else ''}{shown}")
            i += 1
    return "".join(out)


def plain(html_or_text: str, html: bool = False) -> str:
    """What a text says, without tags, spaces and the marks that only say where a sign stands: for comparing."""
    from html import unescape

    text = unescape(re.sub(r"<[^>]+>", "", html_or_text)) if html else html_or_text
    return re.sub(r"[\s`_^]", "", unicodedata.normalize("NFKC", text).replace("∑", "Σ"))


def _pieces(text: str, names: Collection[str]) -> list[Piece]:
    found: list[Piece] = []
    space = False
    for match in TOKEN.finditer(text):
        whole = match[0]
        if whole.isspace():
            space = True
            continue
        kind, drawn = _drawn(match, names)
        found.append(Piece(whole, drawn, kind, space))
        space = False
    return found


def _drawn(match: re.Match[str], names: Collection[str]) -> tuple[str, str]:
    """What a token is, and its MathML."""
    whole = match[0]
    if match["code"]:
        return "text", f"<code>{escape(whole.strip('`'), quote=False)}</code>"
    if match["said"]:
        return "text", ""
    if match["number"]:
        base, power = re.fullmatch(r"([^⁻]+)(⁻.+)?", whole).groups()  # type: ignore[union-attr]
        return "number", _script(f"<mn>{base}</mn>", None, power)
    if match["sum"]:
        sign = f'<mo movablelimits="true">{"∑" if match["sum"] == "Σ" else match["sum"]}</mo>'
        over = match["over"]
        return "math", f"<munder>{sign}<mi>{over}</mi></munder>" if over else sign
    if match["function"] or match["mean"]:
        return "math", f'<mi mathvariant="normal">{whole}</mi>'
    if match["close"]:
        return "bracket", _script(_mark(match["close"]), match["lowered"], match["raised"])
    if match["word"] or (len(whole) > 1 and whole.lower() in WORDS):
        known = whole in names or whole in UPRIGHT
        room = '<mspace width="0.17em"/>' if whole in UPRIGHT else ""
        return (
            "name" if known else "text",
            f'{room}<mi mathvariant="normal">{escape(whole)}</mi>{room}' if known else "",
        )
    if match["letter"]:
        letter = _script(f"<mi>{match['letter']}</mi>", match["index"], match["power"])
        sure = match["index"] or match["power"] or not match["letter"].isascii()
        return ("math" if sure else "letter"), letter
    if whole == "…":
        return "number", _mark(whole)
    if whole in OPERATORS:
        return "operator", _mark(whole)
    if whole in OPEN + CLOSE + BARS:
        return "bracket", _mark(whole)
    if whole in ",;:":
        return "comma", _mark(whole)
    return "text", ""


def _mark(sign: str) -> str:
    if sign in OPEN + CLOSE + BARS:
        return f'<mo stretchy="false" lspace="0" rspace="0">{escape(sign)}</mo>'
    return f"<mo>{escape(sign)}</mo>"


def _script(base: str, index: str | None, power: str | None) -> str:
    below = above = ""
    if index:
        index = unicodedata.normalize("NFKC", index.removeprefix("_"))
        tag = "mn" if index.isdigit() else "mo" if index == "⊥" else "mi"
        below = f"<{tag}>{index}</{tag}>"
    if power:
        signs = power.removeprefix("^") if power.startswith("^") else "".join(RAISED.get(sign, sign) for sign in power)
        signs = unicodedata.normalize("NFKC", signs).replace("-", "−")
        parts = re.findall(r"\d+|\D", signs)
        above = "".join(
            f"<mn>{p}</mn>" if p.isdigit() else f"<mi>{p}</mi>" if p.isalpha() else f"<mo>{p}</mo>" for p in parts
        )
        above = f"<mrow>{above}</mrow>"
    if below and above:
        return f"<msubsup>{base}{below}{above}</msubsup>"
    if below or above:
        tag = "msub" if below else "msup"
        return f"<{tag}>{base}{below or above}</{tag}>"
    return base


def _decided(pieces: Sequence[Piece]) -> list[Piece]:
    """Brackets, commas, letters and numbers are mathematics where what is beside or in them is."""
    kinds = [piece.kind for piece in pieces]
    for i, kind in enumerate(kinds):
        if kind == "text" and pieces[i].text.lower() in WORDS and _glued(pieces, i):
            kinds[i] = "name"
        elif (kind == "letter" and pieces[i].text not in ("a", "A", "I")) or pieces[i].text[0] in BARS:
            kinds[i] = "math"
    for i, kind in enumerate(kinds):
        if kind == "operator":
            kinds[i] = "math" if any(each not in ("text", "comma") for each in _near(kinds, i)) else "text"
    weak = ("letter", "name", "number")
    for _ in range(2):  # what is beside a number that is mathematics is so too
        for i, kind in enumerate(kinds):
            if kind in weak and "math" in _pulling(pieces, kinds, i):
                kinds[i] = "math"
    inside = _inside(pieces)
    pairs = sorted(set(inside.values()), key=lambda pair: pair[1] - pair[0])
    for first, last in pairs:
        within = kinds[first + 1 : last]
        called = first > 0 and kinds[first - 1] == "math" and not pieces[first].space
        some = called or ("math" in within and "text" not in within)
        kinds[first] = kinds[last] = "math" if some else "text"
        for i in range(first + 1, last):
            if some and kinds[i] in (*weak, "comma"):
                kinds[i] = "math"
    for i, kind in enumerate(kinds):
        if kind in weak or kind == "comma" or kind == "bracket":
            kinds[i] = "text"
    return [piece._replace(kind=kind, drawn=_as(piece, kind)) for piece, kind in zip(pieces, kinds, strict=True)]


def _near(kinds: Sequence[str], i: int) -> list[str]:
    """What stands before and behind."""
    return [kinds[k] for k in (i - 1, i + 1) if 0 <= k < len(kinds)]


def _glued(pieces: Sequence[Piece], i: int) -> bool:
    """Whether a word stands at a sign without a space, as in "in·kh·kw"."""
    before = i > 0 and not pieces[i].space and pieces[i - 1].text in "/·"
    return before or (i + 1 < len(pieces) and not pieces[i + 1].space and pieces[i + 1].text in "/·")


def _pulling(pieces: Sequence[Piece], kinds: Sequence[str], i: int) -> list[str]:
    """What stands beside a piece and makes it mathematics, where it is so itself; words and "a" ask for a sign."""
    word = pieces[i].kind in ("name", "text") and pieces[i].text not in UPRIGHT
    if not word and pieces[i].text != "a":
        return _near(kinds, i)
    return [kinds[k] for k in (i - 1, i + 1) if 0 <= k < len(kinds) and pieces[k].kind == "operator"]


def _as(piece: Piece, kind: str) -> str:
    """What draws a piece, once it is decided what it is."""
    if kind == "math":
        return piece.drawn or f'<mi mathvariant="normal">{escape(piece.text, quote=False)}</mi>'
    return piece.drawn if piece.drawn.startswith("<code>") else ""


def _inside(pieces: Sequence[Piece]) -> dict[int, tuple[int, int]]:
    """Place of a bracket -> the places of its pair."""
    stack: list[int] = []
    found: dict[int, tuple[int, int]] = {}
    for i, piece in enumerate(pieces):
        sign = piece.text[0]
        if sign in OPEN and piece.kind == "bracket":
            stack.append(i)
        elif sign in CLOSE and piece.kind == "bracket" and stack:
            first = stack.pop()
            found[first] = found[i] = (first, i)
    return found
