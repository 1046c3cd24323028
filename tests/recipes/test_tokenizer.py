"""What recipes say of the tokenizer and of the template of chats: both schemas, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from twinmerge.errors import RecipeError
from twinmerge.recipes.chat_template import BUILT_IN, check_template, fault_of
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.schema import recipe_from
from twinmerge.recipes.tokenizer import TokenizerChoice, TokenRule

MODELS = "models: [{model: x/a, parameters: {weight: 1}}, {model: x/b, parameters: {weight: 1}}]"


def mergekit(text: str) -> Recipe:
    return recipe_from(yaml.safe_load(f"{{merge_method: linear, base_model: x/a, {MODELS}, {text}}}"))


def ours(text: str) -> Recipe:
    own = "models: [{name: one, model: x/a}, {name: two, model: x/b}]"
    return recipe_from(yaml.safe_load(f"{{twinmerge: 1, merge_method: average, base_model: x/0, {own}, {text}}}"))


@pytest.mark.parametrize(
    "text, source",
    [
        ("tokenizer: {}", "union"),
        ("tokenizer: {source: union}", "union"),
        ("tokenizer_source: union", "union"),
        ("tokenizer_source: base", "base"),
        ("tokenizer_source: x/a", "base"),  # the base's path
        ("tokenizer_source: x/b", "b"),  # a model by its name here
        ("tokenizer_source: {model: {path: x/b}}", "b"),
        ("tokenizer: {source: ./else/where}", "./else/where"),
    ],
)
def test_sources_of_mergekit(text: str, source: str) -> None:
    recipe = mergekit(text)
    assert recipe.tokenizer == TokenizerChoice(source)
    assert recipe_from(recipe.describe()) == recipe


def test_without_a_source_there_is_none() -> None:
    assert mergekit("dtype: float32").tokenizer is None and "tokenizer" not in mergekit("dtype: float32").describe()


RULES = """tokenizer: {source: union, pad_to_multiple_of: 64, tokens: {
    "<a>": {source: x/b}, "<b>": {source: x/a, force: true}, "<c>": {source: {kind: zero}},
    "<d>": {source: {kind: model_token, model: x/b, token: "<z>"}},
    "<e>": {source: {kind: model_token, model: {path: x/a}, token_id: 7}, force: true}}}"""


def test_rules_of_mergekit_name_models_by_their_names_here() -> None:
    recipe = mergekit(RULES)
    assert recipe.tokenizer == TokenizerChoice(
        "union",
        {
            "<a>": TokenRule("b"),
            "<b>": TokenRule("base", None, True),
            "<c>": TokenRule(None),
            "<d>": TokenRule("b", "<z>"),
            "<e>": TokenRule("base", 7, True),
        },
        64,
    )
    assert recipe_from(recipe.describe()) == recipe


@pytest.mark.parametrize(
    "text, choice",
    [
        ("tokenizer: union", TokenizerChoice()),
        ("tokenizer: two", TokenizerChoice("two")),
        ("tokenizer: {keep_padding: true, tokens: {t: {source: one}}}", TokenizerChoice(
            "union", {"t": TokenRule("one")}, None, True
        )),
        ("tokenizer: {tokens: {t: {source: base}}}", TokenizerChoice("union", {"t": TokenRule("base")})),
    ],
)  # fmt: skip
def test_ours(text: str, choice: TokenizerChoice) -> None:
    recipe = ours(text)
    assert recipe.tokenizer == choice and recipe_from(recipe.describe()) == recipe


@pytest.mark.parametrize(
    "text, said",
    [
        ("tokenizer: {source: union}, tokenizer_source: union", "has tokenizer and tokenizer_source. Keep one"),
        ("tokenizer: union", "tokenizer is 'union'. Write tokenizer: {source: union}, or tokenizer_source: union"),
        ("tokenizer: {sorce: union}", "unknown key 'sorce'. Did you mean 'source'"),
        ("tokenizer_source: 7", "7 is no model"),
        ("tokenizer_source: b", "'b' may be a folder or one of the models. Write ./b"),
        ("tokenizer: {pad_to_multiple_of: 0}", "pad_to_multiple_of is 0"),
        ("tokenizer: {pad_to_multiple_of: 2.5}", "pad_to_multiple_of is 2.5"),
        ("tokenizer: {tokens: [a]}", "tokens is"),
        ("tokenizer: {tokens: {a: x/b}}", "Write {source: MODEL}"),
        ("tokenizer: {tokens: {a: {source: x/c}}}", "'x/c' is none of the merged models"),
        ("tokenizer: {tokens: {a: {source: x/b, forced: true}}}", "unknown key 'forced'. Did you mean 'force'"),
        ("tokenizer: {tokens: {a: {source: x/b, force: 1}}}", "force is 1"),
        ("tokenizer: {tokens: {a: {source: {kind: one}}}}", "kind is 'one'. Write one of zero, model_token"),
        ("tokenizer: {tokens: {a: {source: {kind: zero, model: x/b}}}}", "unknown key 'model'"),
        ("tokenizer: {tokens: {a: {source: {kind: model_token, model: x/b}}}}", "one of token and token_id"),
        (
            "tokenizer: {tokens: {a: {source: {kind: model_token, model: x/b, token: t, token_id: 1}}}}",
            "one of token and token_id",
        ),
        ("tokenizer: {tokens: {a: {source: {kind: model_token, model: x/b, token_id: -1}}}}", "names no token"),
        ("tokenizer: {tokens: {a: {source: {kind: model_token, model: x/b, token: 3}}}}", "names no token"),
        ("chat_template: nosuch", "chat_template is 'nosuch', which is no template"),
        ("chat_template: chatlm", "Did you mean 'chatml'"),
        ("chat_template: 7", "chat_template is 7, which is no template"),
        ("chat_template: 'a text of more than twenty letters'", "which is no template"),
        ("chat_template: '{% for m in messages %}{{ m.content }}'", "no template that Jinja reads: .*endfor.*line 1"),
    ],
)
def test_mistakes_in_files_of_mergekit(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        mergekit(text)


@pytest.mark.parametrize(
    "text, said",
    [
        ("tokenizer: 3", "tokenizer is 3. Write tokenizer: union"),
        ("tokenizer: {keep_padding: 1}", "keep_padding is 1"),
        ("tokenizer: {keep_paddin: true}", "unknown key 'keep_paddin'. Did you mean 'keep_padding'"),
        ("tokenizer: {tokens: {a: {source: tow}}}", "'tow', which is no model of the recipe. Did you mean 'two'"),
        ("side_files_from: tow", "side_files_from names 'tow', which is no expert of this merge. Did you mean 'two'"),
        ("side_files_from: base", "side_files_from names 'base', which is no expert"),
    ],
)
def test_mistakes_in_ours(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        ours(text)


def test_what_mergekit_ignores_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="ignored, as by mergekit: 'unrelated' of tokenizer"):
        mergekit("tokenizer: {source: base, unrelated: 1}")


def test_masks_and_statistics_are_of_one_vocabulary() -> None:
    with pytest.raises(RecipeError, match="emr makes masks, which are of one vocabulary"):
        Recipe("emr", "b", {"a": "x"}, tokenizer=TokenizerChoice())
    with pytest.raises(RecipeError, match="reads statistics, which are of the rows that a model has"):
        Recipe("fisher", None, {"a": "x"}, statistics={"a": "f"}, tokenizer=TokenizerChoice())


def test_a_call_takes_what_a_recipe_takes() -> None:
    how: dict[str, Any] = {"tokenizer": {"source": "b"}, "chat_template": "chatml", "side_files_from": "a"}
    recipe = Recipe.of("average", None, {"a": "x", "b": "y"}, **how)
    assert recipe.tokenizer == TokenizerChoice("b") and recipe_from(recipe.describe()) == recipe
    with pytest.raises(RecipeError, match="A recipe says all of a merge"):
        Recipe.of(recipe, chat_template="chatml")


# ------------------------------------------------------------------------------------------ templates

CHAT = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
WRITTEN = {  # as the models of each format publish it
    "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nBye\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"
    "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n"
    "[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be kind.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
}


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_templates_write_what_their_models_read(name: str) -> None:
    """Rendered as transformers renders them: without the line feed after a tag."""
    import jinja2

    messages = [{"role": role, "content": content} for role, content in CHAT]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    made = environment.from_string(BUILT_IN[name])
    given = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    assert made.render(messages=messages, **given) == WRITTEN[name]
    assert check_template(name, "it") == name and fault_of(BUILT_IN[name]) is None


@pytest.mark.parametrize(
    "tag", ["{% generation %}{{ m }}{% endgeneration %}", "{% for m in a %}{% break %}{% endfor %}"]
)
def test_tags_of_transformers_are_known(tag: str) -> None:
    assert check_template(tag, "it") == tag


def test_a_template_that_is_nested_without_end_is_refused() -> None:
    assert fault_of("{% if a %}" * 3000) is not None
