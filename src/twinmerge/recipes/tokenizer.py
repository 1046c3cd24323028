"""What a recipe says of the output's tokenizer: whose tokens it has, and where single rows come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from twinmerge.errors import RecipeError, nearest
from twinmerge.recipes.slices import BASE, known_keys

KEY = "tokenizer"
UNION = "union"
KEYS = ("source", "tokens", "pad_to_multiple_of")
OWN_KEYS = (*KEYS, "keep_padding")
RULE_KEYS = ("source", "force")
KINDS = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}


@dataclass(frozen=True)
class TokenRule:
    """Where a token's row comes from in the models that lack it.

    Attributes:
        model: the name of an expert, or "base"; None for zeros.
        token: another token of that model, or the number of one; None for the same.
        force: in all models, also in those that have the token.
    """

    model: str | None
    token: str | int | None = None
    force: bool = False

    def describe(self) -> dict[str, Any]:
        """The same as plain data."""
        source: Any = self.model
        if self.model is None:
            source = {"kind": "zero"}
        elif self.token is not None:
            key = "token" if isinstance(self.token, str) else "token_id"
            source = {"kind": "model_token", "model": self.model, key: self.token}
        return {"source": source} | ({"force": True} if self.force else {})


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer of the output.

    Attributes:
        source: "union" of those of all models; "base"; the name of an expert; or a path or hub id, of a model that need
            not be merged.
        tokens: token -> where its row comes from. Tokens that the source lacks are added at its end.
        pad_to_multiple_of: rows are added at the end of the tables until they are a multiple of it.
        keep_padding: rows of the base that no token has stay where they are; without, they are left out.
    """

    source: str = UNION
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    keep_padding: bool = False

    @classmethod
    def of(cls, raw: Any, where: str = "tokenizer") -> TokenizerChoice:
        """What our recipes and calls say: a source alone, or a mapping.

        Raises:
            RecipeError: an unknown key, a value of another kind.

        Example:
            >>> TokenizerChoice.of("base")
            TokenizerChoice(source='base', tokens={}, pad_to_multiple_of=None, keep_padding=False)
            >>> TokenizerChoice.of({"tokens": {"<new>": {"source": {"kind": "zero"}}}}).tokens
            {'<new>': TokenRule(model=None, token=None, force=False)}
        """
        if isinstance(raw, cls):
            return raw
        raw = {"source": raw} if isinstance(raw, str) else raw
        if not isinstance(raw, Mapping):
            raise RecipeError(f"{where} is {raw!r:.80}. Write {KEY}: {UNION}, {BASE}, or the name of a model.")
        known_keys(raw, OWN_KEYS, where)
        return read_choice(raw, where, _name, _name)

    def describe(self) -> dict[str, Any]:
        """The same as plain data."""
        found: dict[str, Any] = {"source": self.source}
        if self.tokens:
            found["tokens"] = {token: rule.describe() for token, rule in self.tokens.items()}
        if self.pad_to_multiple_of is not None:
            found["pad_to_multiple_of"] = self.pad_to_multiple_of
        return found | ({"keep_padding": True} if self.keep_padding else {})

    def check(self, experts: Mapping[str, Any], base: bool) -> None:
        """Refuse rules that name no model of the recipe.

        Args:
            experts: by their names.
            base: whether there is a base.

        Raises:
            RecipeError: one does; a source that is "base" where there is none.
        """
        known = [*experts, *([BASE] if base else [])]
        for token, rule in self.tokens.items():
            if rule.model is not None and rule.model not in known:
                raise RecipeError(
                    f"{KEY}: the row of {token!r} is to come from {rule.model!r}, which is no model of the recipe."
                    f"{nearest(rule.model, known)} Name one of {', '.join(known)}."
                )


def read_choice(
    raw: Mapping[str, Any], where: str, source: Callable[[Any, str], str], model: Callable[[Any, str], str]
) -> TokenizerChoice:
    """A choice out of plain data whose keys are known.

    Args:
        raw: the data.
        where: for messages.
        source: gives the name or path of a model, of what stands for the source.
        model: gives the name of a model of the recipe, of what stands for one in a rule.

    Raises:
        RecipeError: a value of another kind.
    """
    tokens = raw.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        raise RecipeError(f"{where}: tokens is {tokens!r:.80}. Write tokens: {{TOKEN: {{source: MODEL}}}}.")
    multiple, keep = raw.get("pad_to_multiple_of"), raw.get("keep_padding", False)
    if multiple is not None and (type(multiple) is not int or not 1 <= multiple <= 1 << 20):
        raise RecipeError(f"{where}: pad_to_multiple_of is {multiple!r:.80}. Write a whole number, such as 64.")
    if not isinstance(keep, bool):
        raise RecipeError(f"{where}: keep_padding is {keep!r:.80}. Write true or false.")
    said = raw.get("source")
    return TokenizerChoice(
        UNION if said is None else said if said in (UNION, BASE) else source(said, f"{where}, source"),
        {token: _rule(token, each, where, model) for token, each in tokens.items()},
        multiple,
        keep,
    )


def _rule(token: Any, raw: Any, where: str, model: Callable[[Any, str], str]) -> TokenRule:
    at = f"{where}, token {token!r:.80}"
    if not isinstance(token, str) or not token:
        raise RecipeError(f"{at} is no text. Put it in quotes.")
    if not isinstance(raw, Mapping) or raw.get("source") is None:
        raise RecipeError(f"{at}: it is {raw!r:.80}. Write {{source: MODEL}}, or {{source: {{kind: zero}}}}.")
    known_keys(raw, RULE_KEYS, at)
    source, force = raw["source"], raw.get("force", False)
    if not isinstance(force, bool):
        raise RecipeError(f"{at}: force is {force!r:.80}. Write true or false.")
    if not isinstance(source, Mapping) or "kind" not in source:
        return TokenRule(model(source, at), None, force)
    if not isinstance(source["kind"], str) or source["kind"] not in KINDS:
        raise RecipeError(f"{at}: kind is {source['kind']!r:.80}. Write one of {', '.join(KINDS)}.")
    known_keys(source, KINDS[source["kind"]], at)
    if source["kind"] == "zero":
        return TokenRule(None, None, force)
    text, number = source.get("token"), source.get("token_id")
    if (text is None) == (number is None) or source.get("model") is None:
        raise RecipeError(f"{at}: kind model_token needs a model, and one of token and token_id.")
    if not (isinstance(text, str) and text) and not (type(number) is int and number >= 0):
        raise RecipeError(f"{at}: it names no token of the other model. Write token: TEXT, or token_id: NUMBER.")
    return TokenRule(model(source["model"], at), number if text is None else text, force)


def _name(raw: Any, where: str) -> str:
    if not isinstance(raw, str) or not raw:
        raise RecipeError(f"{where}: {raw!r:.80} is no model. Write its name.")
    return raw
