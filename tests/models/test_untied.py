"""An output layer of an expert's own, where the base ties its: merged with the base's embeddings, and tied no more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from twinmerge.engine.merge import Merge
from twinmerge.engine.verify import verify
from twinmerge.errors import ModelError
from twinmerge.models.opening import open_model
from twinmerge.models.untied import untied
from twinmerge.recipes.schema import recipe_from

HEAD, TABLE = "lm_head.weight", "embed_tokens.weight"


@pytest.fixture(scope="module")
def pair(build, tuned, tmp_path_factory):
    """A model that ties its output layer, and one of the same body that has its own."""
    root = tmp_path_factory.mktemp("pair")
    base = build("LlamaForCausalLM", tie_word_embeddings=True)
    own = build("LlamaForCausalLM", tie_word_embeddings=False)
    own.model.load_state_dict(tuned(base, 1).model.state_dict())
    base.save_pretrained(root / "tied")
    own.save_pretrained(root / "own")
    return root


def linear(root: Path, *order: str, **more: str) -> dict[str, object]:
    models = [{"model": str(root / name), "parameters": {"weight": w}} for name, w in zip(order, (1, 3), strict=True)]
    return {"merge_method": "linear", "models": models, "dtype": "float32", **more}


@pytest.mark.filterwarnings("ignore:.*(by name alone|of its own)")
def test_both_orders_give_the_mean_of_head_and_embeddings(pair, tmp_path):
    """By hand: (1 · one + 3 · other) / 4, the tied model's output layer being its embeddings."""
    tied, own = (AutoModelForCausalLM.from_pretrained(pair / name).eval() for name in ("tied", "own"))
    for order, weights in {("tied", "own"): (0.25, 0.75), ("own", "tied"): (0.75, 0.25)}.items():
        merge = Merge(recipe_from(linear(pair, *order)), progress=False)
        out = merge.save(tmp_path / order[0])
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        got = AutoModelForCausalLM.from_pretrained(out)
        a, b = weights
        want = a * tied.model.embed_tokens.weight + b * own.lm_head.weight
        torch.testing.assert_close(got.lm_head.weight, want, rtol=1e-6, atol=1e-7)
        want = a * tied.model.embed_tokens.weight + b * own.model.embed_tokens.weight
        torch.testing.assert_close(got.model.embed_tokens.weight, want, rtol=1e-6, atol=1e-7)
        assert verify(out, progress=False).ok


def test_it_is_told_and_the_papers_semantics_refuse_it(pair):
    with pytest.warns(UserWarning, match=f"own has '{HEAD}' of its own, and .*tied ties it to '{TABLE}'.*: false"):
        Merge(recipe_from(linear(pair, "tied", "own")), progress=False).check()
    with pytest.raises(ModelError, match=f"'{HEAD}' of .* has its own values, and the base .* ties it"):
        Merge(recipe_from(linear(pair, "tied", "own", compat="paper")), progress=False).check()


def test_a_tied_base_stays_where_nothing_says_otherwise(build, tuned, pair):
    base = open_model(build("LlamaForCausalLM", tie_word_embeddings=True), "base")
    copied = build("LlamaForCausalLM", tie_word_embeddings=False)
    with torch.no_grad():
        copied.lm_head.weight.copy_(copied.model.embed_tokens.weight)
    same = {"a": open_model(tuned(build("LlamaForCausalLM", tie_word_embeddings=True), 1), "a")}
    assert untied(base, same | {"b": open_model(copied, "b")}) is base
    other = {"own": open_model(str(pair / "own"))}
    assert untied(base, other, ["lm_head"]) is base
    free = untied(open_model(str(pair / "own")), same)
    assert HEAD in free.specs and not free.changes
