"""PEFT's `rank_pattern` and `alpha_pattern`: values for modules whose dotted name ends in an expression.

The expressions come with the adapter, from anybody. So they are matched only where that takes bounded work: most are
plain names, which are looked up, and of the rest the steps are bounded before anything is matched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from twinmerge.errors import ModelError

MOST_STEPS = 1_000_000  # of one name through all expressions; one with three times `.*` may take as many
MOST_EXPRESSIONS = 5_000  # plain names do not count
LONGEST = 1_000  # letters of one expression
ANY, NARROW = 100, 10  # what a repetition multiplies the ways by: of any letter, and of a class or a letter

PLAIN = re.compile(r"^(?P<anchor>\^?)(?P<name>(?:[\w/]|-|\\?\.|\\-)+)$")
TOKEN = re.compile(
    r"\\[AbBZ]|\\[^\d]|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\(|\)|\||[*+?]\??|\{\d*(?:,\d*)?\}\??|[.^$]|[^\\\[\](){}*+?|]",
    re.DOTALL,
)


class Patterns:
    """The first pattern that matches the end of a module's dotted name gives its value: PEFT's rule.

    Raises:
        TwinmergeError: what is no expression, or one whose matching could take more than a million steps.

    Example:
        >>> patterns = Patterns({"^block.first": 3, "l.st": 5, r"layers\\.(0|1)\\..*proj": 7}, "rank_pattern of a")
        >>> [patterns.get(name, 8) for name in ("block.first", "x.block.first", "a.last", "layers.1.q_proj")]
        [3, 8, 5, 7]
    """

    def __init__(self, values: Mapping[str, float], where: str) -> None:
        self._names: dict[tuple[bool, str], int] = {}
        self._expressions: list[tuple[int, re.Pattern[str]]] = []
        self._values = list(values.values())
        steps = 0.0
        for at, text in enumerate(values):
            if (plain := PLAIN.match(text)) and "." not in plain["name"].replace("\\.", ""):
                name = plain["name"].replace("\\", "")
                self._names.setdefault((bool(plain["anchor"]), name), at)
            else:
                expression, its_steps = _compiled(text, where)
                self._expressions.append((at, expression))
                steps += its_steps
                if steps > MOST_STEPS or len(self._expressions) > MOST_EXPRESSIONS:
                    raise ModelError(
                        f"The expressions of the {where} could take very long to match. Write the modules' names "
                        "instead."
                    )

    def get(self, module: str, default: float) -> float:
        parts = module.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts))]
        found = [self._names.get((False, end)) for end in ends]
        found.append(self._names.get((True, module)))
        first = min((at for at in found if at is not None), default=len(self._values))
        for at, expression in self._expressions:
            if at > first:
                break
            if expression.match(module):
                return self._values[at]
        return self._values[first] if first < len(self._values) else default


def _compiled(text: str, where: str) -> tuple[re.Pattern[str], float]:
    try:
        if len(text) > LONGEST:
            raise ValueError("it is too long")
        if (steps := steps_of(text)) > MOST_STEPS:
            raise ValueError("it could take very long")
        return re.compile(rf"(.*\.)?({text})$"), steps
    except (ValueError, re.error, RecursionError, OverflowError) as error:
        shown = text if len(text) <= 60 else f"{text[:60]}…"
        raise ModelError(
            f"The expression {shown!r} in the {where} is not matched ({error}). Write the modules' names instead."
        ) from error


def steps_of(pattern: str) -> float:
    """A bound on the ways in which an expression can match a name of a hundred letters; infinite where it is not known.

    Raises:
        ValueError: something else than letters, classes, groups, alternatives and repetitions.

    Example:
        >>> steps_of("a.*b"), steps_of("(a|b)c?"), steps_of("(a+)+"), steps_of("(a|a)")
        (100, 2, inf, 2)
    """
    at = 0
    outer: list[
        list[tuple[float, str | None]]
    ] = []  # alternatives of the open groups: their ways, and their text if plain
    group: list[tuple[float, str | None]] = [(1, "")]
    ways, text, last = 1.0, "", "nothing"  # of the atom that a repetition would repeat
    while at < len(pattern):
        found = TOKEN.match(pattern, at)
        if found is None:
            raise ValueError(f"{pattern[at : at + 10]!r} is not understood")
        token, at = found[0], found.end()
        if token in ("(", "(?:"):
            outer.append(group)
            group, last = [(1, "")], "nothing"
        elif token == ")":
            if not outer:
                raise ValueError("a bracket is not opened")
            ways, plain = _ways(group), group[0][1] if len(group) == 1 else None
            group = outer.pop()
            _append(group, ways, plain)
            last = "group"
        elif token == "|":
            group.append((1, ""))
            last = "nothing"
        elif token[0] in "*+?{":
            if last == "nothing":
                raise ValueError("nothing is repeated")
            _repeat(group, token, ways, last)
            last = "nothing"
        else:
            text = token[1:] if token[0] == "\\" and not token[1].isalnum() else token
            plain = text if len(text) == 1 and token not in (".", "^", "$") else None
            ways, last = 1.0, "any" if token == "." else "narrow"
            _append(group, 1, plain)
    if outer:
        raise ValueError("a bracket is not closed")
    found_ways = _ways(group)
    return int(found_ways) if found_ways < float("inf") else found_ways


def _append(group: list[tuple[float, str | None]], ways: float, plain: str | None) -> None:
    before, text = group[-1]
    group[-1] = before * ways, None if text is None or plain is None else text + plain


def _repeat(group: list[tuple[float, str | None]], token: str, ways: float, last: str) -> None:
    if token[0] == "{":
        low, _, high = token.rstrip("?")[1:-1].partition(",")
        least, most = int(low or 0), int(high) if high else (int(low or 0) if "," not in token else None)
    else:
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[token[0]]
    if (most or 0) > LONGEST:
        raise ValueError("it repeats too often")
    if ways > 1 and most != 1:
        factor = float("inf")  # a repetition, or a choice, inside a repetition
    elif most is None:
        factor = ANY if last == "any" else NARROW
    else:
        factor = most - least + 1
    _append(group, factor, None)


def _ways(group: list[tuple[float, str | None]]) -> float:
    """Alternatives that are plain texts match in as many ways as there are beginnings of one among them."""
    texts = sorted(text for _, text in group if text is not None)
    chain: list[str] = []
    deepest = 0
    for text in texts:
        while chain and not text.startswith(chain[-1]):
            chain.pop()
        chain.append(text)
        deepest = max(deepest, len(chain))
    return deepest + sum(ways for ways, text in group if text is None)
