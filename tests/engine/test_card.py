"""The card: front matter that hubs take, whatever its sources hold; lines of Python that run; what to cite."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, T5Config, ViTConfig

import twinmerge
from twinmerge.engine.calls import merge
from twinmerge.engine.card import AUTHORS, TITLE, Named, model_card
from twinmerge.engine.front import all_on_hub, base_models, front_of
from twinmerge.engine.usage import usage_of
from twinmerge.methods.kit.listing import source_of
from twinmerge.methods.kit.registry import method_names
from twinmerge.recipes.recipe import Recipe

ROOT = Path(__file__).parents[2]
BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 12}
LLAMA = {**BERT, "num_key_value_heads": 1}
CLASSES: dict[str, Any] = {
    "LlamaForCausalLM": LlamaConfig(**LLAMA, max_position_embeddings=64),
    "GPT2LMHeadModel": GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=12, n_positions=64),
    "BertForSequenceClassification": BertConfig(**BERT, id2label={0: "no", 1: "yes"}),
    "BertForTokenClassification": BertConfig(**BERT),
    "BertForQuestionAnswering": BertConfig(**BERT),
    "BertForMaskedLM": BertConfig(**BERT),
    "BertForNextSentencePrediction": BertConfig(**BERT),
    "BertModel": BertConfig(**BERT),
    "T5ForConditionalGeneration": T5Config(
        vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    ),
    "T5Model": T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2),
    "ViTForImageClassification": ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    ),
}


def parts(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


def code_of(text: str) -> str:
    return text.split("## Use\n\n```python\n")[1].split("```")[0]


def ran(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """What the code prints where the folder is."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "card", "exec"), {})
    return str(capsys.readouterr().out)


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_the_lines_that_a_card_shows_run(
    name: str, tokens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for each in "ab":
        torch.manual_seed(0)
        getattr(transformers, name)(CLASSES[name]).save_pretrained(tmp_path / each)
    if tokens and "ViT" not in name:
        words = {w: i for i, w in enumerate(["<unk>", "</s>", "The", "film", "was", *"uvwxyz", "."])}
        own = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        own.pre_tokenizer = pre_tokenizers.Whitespace()
        inputs = ["input_ids", "attention_mask"]
        PreTrainedTokenizerFast(
            tokenizer_object=own, unk_token="<unk>", eos_token="</s>", pad_token="</s>", model_input_names=inputs
        ).save_pretrained(tmp_path / "a")
    elif tokens:
        size = {"height": 8, "width": 8}
        transformers.ViTImageProcessor(size=size).save_pretrained(tmp_path / "a")
    out = merge("average", None, {x: str(tmp_path / x) for x in "ab"}, progress=False).save(tmp_path / "out")
    front, text = parts((out / "README.md").read_text())
    said = ran(code_of(text), out, monkeypatch, capsys)
    assert front["library_name"] == "transformers" and said.strip()
    tried = {"LlamaForCausalLM", "GPT2LMHeadModel", "BertForSequenceClassification", "BertForTokenClassification"}
    assert ("from_pretrained(folder)\nprint(type(model)" in text) == (
        not tokens or name not in tried | {"BertForMaskedLM", "BertModel", "ViTForImageClassification"}
    )
    if name.startswith("BertForS") and tokens:
        assert said.strip() in ("no", "yes")
    if name == "T5ForConditionalGeneration":
        assert "import T5ForConditionalGeneration" in text and said.strip() == name


def test_models_of_other_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The libraries are not here: what is called of them is."""
    asked: list[tuple[str, Any]] = []

    def fake(library: str, *names: str) -> None:
        module = ModuleType(library)
        for name in names:

            class Opened:
                def __init__(self, folder: str) -> None:
                    asked.append((type(self).__name__, folder))

                @classmethod
                def from_pretrained(cls, folder: str) -> Opened:
                    return cls(folder)

                def encode(self, texts: list[str]) -> torch.Tensor:
                    return torch.zeros(len(texts), 2)

                predict = encode

            Opened.__name__ = name
            setattr(module, name, Opened)
        monkeypatch.setitem(sys.modules, library, module)

    fake("sentence_transformers", "SentenceTransformer", "CrossEncoder")
    fake("diffusers", "DiffusionPipeline", "UNet2DModel")
    kinds = {
        "modules.json": (b"[]", "sentence-transformers", "SentenceTransformer"),
        "model_index.json": (b"{}", "diffusers", "DiffusionPipeline"),
        "config.json": (b'{"_class_name": "UNet2DModel"}', "diffusers", "UNet2DModel"),
    }
    for file, (content, library, called) in kinds.items():
        folder = tmp_path / called
        folder.mkdir()
        (folder / file).write_bytes(content)
        usage = usage_of(folder)
        assert usage.library == library
        ran(usage.code, folder, monkeypatch, capsys)
        assert asked[-1] == (called, ".")
    for named, called in (("CrossEncoder", "CrossEncoder"), ("os.system", "SentenceTransformer")):
        folder = tmp_path / "SentenceTransformer"
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"model_type": named}))
        ran(usage_of(folder).code, folder, monkeypatch, capsys)
        assert asked[-1] == (called, ".")


def test_tensors_without_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from safetensors.torch import save_file

    for each in "ab":
        (tmp_path / each).mkdir()
        save_file({"w": torch.ones(2), "v": torch.ones(3)}, tmp_path / each / "model.safetensors")
    out = merge("average", None, {x: str(tmp_path / x) for x in "ab"}, progress=False).save(tmp_path / "out")
    front, text = parts((out / "README.md").read_text())
    assert "library_name" not in front and ran(code_of(text), out, monkeypatch, capsys).strip() == "2"
    (out / "config.json").write_text('{"model_type": "x", "architectures": ["os.system(\\"x\\")"]}')
    assert usage_of(out).library is None  # no class's name
    (out / "config.json").write_text('{"model_type": "x", "architectures": ["XForCausalLM"]}')
    assert usage_of(out, known=False).library is None  # by names alone


def source(folder: Path, front: str) -> Named:
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(f"---\n{front}---\n# text\n", encoding="utf-8")
    return Named(str(folder), folder, None)


def card_of(experts: dict[str, Named], recipe: dict[str, Any] | None = None, folder: Path | None = None) -> Any:
    described = {
        "merge_method": "ties",
        "base_model": None,
        "models": [{"name": n, "model": str(each.name)} for n, each in experts.items()],
        "parameters": {},
        **(recipe or {}),
    }
    provenance = {"recipe": described, "semantics": "paper", "parameters": {}}
    first = next(iter(experts.values()))
    return parts(model_card(provenance, first, experts, (), folder=folder or first.folder))


ODD = [
    "it's",
    'say "hi"',
    "a: b",
    "# no",
    "- x",
    "{y}",
    "null",
    "1.0",
    "yes",
    "é 漢 🙂",
    "*a",
    "&b",
    "!tag",
    "|",
    "`c`",
    "%d",
    "@e",
]


@pytest.mark.parametrize("odd", ODD)
def test_front_matter_is_yaml_whatever_a_source_is_called(tmp_path: Path, odd: str) -> None:
    said = yaml.safe_dump({"license": odd, "datasets": [odd, "org/d"]}, allow_unicode=True)
    one, two = source(tmp_path / "a" / odd, said), source(tmp_path / "b" / odd, said)
    front, text = card_of({"one": one, "two": two})
    assert front["license"] == odd and front["datasets"] == [odd, "org/d"]
    assert all(isinstance(each, str) for each in (front["license"], *front["datasets"], *front.get("base_model", [])))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)


def test_licences_and_datasets_go_on_where_they_agree_and_are_told_else(tmp_path: Path) -> None:
    made = {
        "plain": "license: mit\ndatasets:\n- org/a\n\n- org/b\n",
        "same": "language: en\nlicense: [mit]\ndatasets: [org/a, org/b]\ntags: [x]\n",
        "other": "license: other\nlicense_name: own\nlicense_link: https://example.org/own\ndatasets: org/c\n",
        "silent": "tags: [x]\n",
        "broken": "license: [\n",
    }
    of = {name: source(tmp_path / name, text) for name, text in made.items()}
    front, text = card_of({"a": of["plain"], "b": of["same"]})
    assert front["license"] == "mit" and front["datasets"] == ["org/a", "org/b"] and "not stated" not in text
    front, text = card_of({"a": of["plain"], "b": of["other"]})
    assert "license" not in front and "datasets" not in front and "license_name" not in front
    assert "more than one licence" in text and "- a: org/a, org/b\n- b: org/c\n" in text
    front, text = card_of({"a": of["other"], "b": of["silent"]})
    assert {k: v for k, v in front.items() if k.startswith("license")} == {
        "license": "other",
        "license_name": "own",
        "license_link": "https://example.org/own",
    }
    assert "states; b: not stated." in text
    front, text = card_of({"a": of["silent"], "b": of["broken"]})
    assert "license" not in front and "datasets" not in front and text.count("| not stated |") == 3


def test_what_the_base_was_trained_on_is_not_what_the_merge_was_tuned_on(tmp_path: Path) -> None:
    said = {"base": "datasets: [org/p, org/q]\n", "a": "datasets: [org/a]\n", "silent": "tags: [x]\n"}
    of = {name: source(tmp_path / name, text) for name, text in said.items()}

    def written(experts: dict[str, Named]) -> tuple[dict[str, Any], str]:
        recipe = Recipe("average", "base", dict.fromkeys(experts, "x")).describe()
        return parts(model_card({"recipe": recipe, "parameters": {}}, of["base"], experts, []))

    front, text = written({"a": of["a"]})
    assert front["datasets"] == ["org/a"] and "- base: org/p, org/q\n- a: org/a\n" in text
    front, text = written({"silent": of["silent"]})
    assert "datasets" not in front and "as the inputs state them:\n\n- base: org/p, org/q\n" in text


def test_base_models_are_ids_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    cached = tmp_path / "models--org--cached" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    inner = Recipe("average", None, {"x": "org/x@main", "y": "<X in memory>"}).describe()
    models = [{"model": "mine"}, {"model": str(cached)}, {"model": {"recipe": inner}}, {"model": "org/b+org/lora"}]
    found = base_models({"base_model": "org/b", "models": models})
    assert found == ["org/b", "org/cached", "org/x", "org/lora"]
    assert base_models({"base_model": None, "models": [{"model": "./b"}, {"model": "/"}, {"model": "mine"}]}) == []
    assert not all_on_hub({"base_model": "org/b", "models": models})
    assert all_on_hub({"base_model": None, "models": [{"model": "org/b+org/lora"}]})


def test_a_recipe_with_fences_is_one_block(tmp_path: Path) -> None:
    one = source(tmp_path / "a", "license: mit\n")
    _, text = card_of({"one": one}, {"chat_template": "{{ x }}\n```python\n````\n"})
    fence = "`" * 5
    block = text.split(f"{fence}yaml\n")[1].split(f"\n{fence}\n")[0]
    assert yaml.safe_load(block)["chat_template"] == "{{ x }}\n```python\n````\n"


def test_what_to_cite_is_what_the_project_says(tmp_path: Path) -> None:
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cff["title"] == TITLE and [each["name"] for each in cff["authors"]] == [AUTHORS]
    one = source(tmp_path / "a", "")
    _, text = card_of({"one": one}, {"lines": {"a": 0.5, "b": 0.5}})
    cite = text.split("## Cite\n")[1]
    assert "arXiv 2306.01708" in cite and "arXiv 2410.17146" in cite
    assert f"title = {{{TITLE}}}" in cite and f"version = {{{twinmerge.__version__}}}" in cite
    assert "no/such" not in card_of({"one": one}, {"merge_method": "<Mine of __main__>"})[1].split("## Cite")[1]


@pytest.mark.parametrize("name", method_names())
def test_every_method_says_where_it_comes_from(name: str) -> None:
    said = source_of(name)
    assert said and "\n" not in said and len(said) > 10


def test_a_card_that_is_no_card_says_nothing(tmp_path: Path) -> None:
    for number, text in enumerate(["", "---\n", "# x\n---\nlicense: mit\n---\n", "---\nlicense: {a: b}\n---\n"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "README.md").write_text(text)
        assert front_of(folder).licences == () and front_of(folder).licence is None
    assert front_of(None).datasets == ()


def test_the_card_of_a_plan_that_was_edited_does_not_promise_the_same_again(tmp_path: Path) -> None:
    one = source(tmp_path / "a", "")
    provenance = {
        "recipe": {"merge_method": "ties", "base_model": None, "models": [{"name": "one", "model": "x/y"}]},
        "parameters": json.loads("{}"),
    }
    plain, edited = (
        model_card({**provenance, **more}, one, {"one": one}, (), folder=one.folder) for more in ({}, {"rules": []})
    )
    assert "twinmerge merge twinmerge.resolved.yaml OUT" in plain and "resolved.yaml" not in edited
    twin = model_card(provenance, SimpleNamespace(name="b", folder=None, commit="c0"), {"one": one}, (), "twin")
    assert "2406.15479" in twin and "`b` at commit c0" in twin and "resolved" not in twin
