"""What people type with a recipe: options that say something else than it does, mergekit's own options, several
documents, outputs that are there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from twinmerge.errors import UsageError
from twinmerge.recipes.mergekit_options import OPTIONS, translated_options

TINY: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**TINY))
    base.save_pretrained(root / "base")
    for name in "ab":
        model = LlamaForCausalLM(LlamaConfig(**TINY))
        model.load_state_dict({n: t + 0.02 * torch.randn_like(t) for n, t in base.state_dict().items()})
        model.save_pretrained(root / name)
    (root / "r.yaml").write_text(
        f"merge_method: ties\nbase_model: {root}/base\ndtype: float32\nmodels:\n"
        f"- {{model: {root}/a, parameters: {{weight: 0.5, density: [0.2, 0.8]}}}}\n"
        f"- {{model: {root}/b, parameters: {{weight: 0.5, density: 0.3}}}}\n"
    )
    (root / "same.yaml").write_text(
        f"merge_method: ties\nbase_model: {root}/base\ndtype: bfloat16\nmodels:\n"
        f"- {{model: {root}/a, parameters: {{weight: 0.5, density: 0.9}}}}\n"
        f"- {{model: {root}/b, parameters: {{weight: 0.5, density: 0.9}}}}\n"
    )
    return root


def test_options_take_the_place_of_what_the_recipe_says(zoo: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    done = command("merge", zoo / "r.yaml", tmp_path / "out", "-p", "density=0.9", "--dtype", "bfloat16")
    assert "By an option: density = 0.9 in the place of a.density =" in (done.out + done.err).replace("\n", " ")
    command("merge", zoo / "same.yaml", tmp_path / "same")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "same"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_a_gradient_beside_a_file_is_that_of_the_file(zoo: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    sources = f"[{{model: {zoo}/base, layer_range: [0, 2]}}, {{model: {zoo}/a, layer_range: [0, 2]}}]"
    text = (
        f"merge_method: slerp\nbase_model: {zoo}/base\ndtype: float32\nslices: [{{sources: {sources}}}]\nparameters: "
    )
    said = "[{filter: tn.q, value: [0, 1]}, {filter: mpl, value: 0}, {value: 0.25}]"
    (tmp_path / "file.yaml").write_text(f"{text}{{t: {said}}}\n")
    (tmp_path / "plain.yaml").write_text(f"{text}{{t: 0.5}}\n")
    in_file = command("merge", tmp_path / "file.yaml", tmp_path / "one")
    beside = command("merge", tmp_path / "plain.yaml", tmp_path / "two", "-p", f"t={said}", "--random-seed", "3")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert all(torch.equal(one[n], two[n]) for n in one)
    base = load_file(zoo / "base/model.safetensors")
    layers = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    assert torch.equal(two[layers[0]], base[layers[0]]) and not torch.equal(two[layers[1]], base[layers[1]])
    for done in (in_file, beside):
        told = done.err.replace("\n", " ")
        assert told.count("no merged tensor") == 1 and "'mpl' (of t; did you mean 'mlp'?)" in told
    told = (beside.out + beside.err).replace("\n", " ")
    assert "in the place of t = 0.5" in told and "slerp draws nothing at random" in told
    assert "no merged tensor" in command("check", tmp_path / "file.yaml").err.replace("\n", " ")


def test_what_may_stand_beside_a_recipe(zoo: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    done = command("merge", zoo / "same.yaml", tmp_path / "out", "--head", "lm_head", "--chat-template", "chatml")
    told = (done.out + done.err).replace("\n", " ")
    assert "By an option: heads = lm_head." in told and "By an option: chat_template = chatml." in told
    assert sorted(each.name for each in (tmp_path / "out/heads").iterdir())[0].startswith("a")
    refused = command("merge", zoo / "same.yaml", tmp_path / "x", "--lines", "b=1").err.replace("\n", " ")
    for option in ("-p", "--head", "--tokenizer", "--chat-template", "--side-files-from", "--allow-pickle"):
        assert f"{option}," in refused
    assert command("check", zoo / "same.yaml", "--side-files-from", "c").code == 2


def test_check_prints_a_recipe_that_merges_to_the_same(zoo: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    checked = command("recipe", "check", zoo / "r.yaml")
    (tmp_path / "checked.yaml").write_text(checked.out)
    assert "by mergekit's semantics" in checked.err
    assert command("recipe", "check", tmp_path / "checked.yaml").out == checked.out
    command("merge", zoo / "r.yaml", tmp_path / "out")
    command("merge", tmp_path / "checked.yaml", tmp_path / "same")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "same/model.safetensors").read_bytes()


def test_mergekits_options_are_understood(zoo: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    words = [
        "--lazy-unpickle",
        "--out-shard-size",
        "1M",
        "--copy-tokenizer",
        "--lora-merge-cache",
        "x",
        "--num-threads",
        "1",
    ]
    done = command("merge", zoo / "r.yaml", tmp_path / "out", *words)
    assert "Note: --lazy-unpickle: tensors are read as they are needed." in done.err
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_mergekit_is_translated_noted_or_refused(name: str) -> None:
    option = OPTIONS[name]
    words = ["r", name, *(["5B"] if option.takes else []), "out"]
    if option.refused:
        with pytest.raises(UsageError, match=f"{name}, an option of mergekit, is not taken"):
            translated_options(words)
        return
    found, said = translated_options(words)
    assert found[0] == "r" and found[-1] == "out" and len(found) == 2 + len(option.here)
    assert bool(said) == bool(option.said)


def test_shards_have_the_size_that_is_asked_for(zoo: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    command("merge", zoo / "r.yaml", tmp_path / "out", "--shard-size", "2kB")
    shards = sorted(tmp_path.glob("out/model-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "out" / "model.safetensors.index.json").is_file()
    LlamaForCausalLM.from_pretrained(tmp_path / "out")
    done = command("merge", zoo / "r.yaml", tmp_path / "x", "--shard-size", "4%")
    assert done.code == 2 and "is no size of a file" in done.err


def test_an_output_is_overwritten_when_asked_and_only_if_it_is_ours(
    zoo: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    command("merge", zoo / "r.yaml", out)
    before = (out / "model.safetensors").read_bytes()
    assert "there already" in command("merge", zoo / "same.yaml", out).err
    assert (out / "model.safetensors").read_bytes() == before
    command("merge", zoo / "same.yaml", out, "--overwrite")
    assert (out / "model.safetensors").read_bytes() != before and not (tmp_path / "out.partial").exists()
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("mine")
    assert "was not written by twinmerge" in command("merge", zoo / "r.yaml", own, "--overwrite").err
    assert (own / "thesis.txt").read_text() == "mine"


def test_a_file_of_several_recipes_with_and_without_folders_on_the_way(
    zoo: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    text = f"""
name: mid
merge_method: linear
models: [{{model: {zoo}/a}}, {{model: {zoo}/b}}]
parameters: {{weight: 0.5}}
---
merge_method: task_arithmetic
base_model: {zoo}/base
models: [{{model: mid, parameters: {{weight: 0.5}}}}]
"""
    (tmp_path / "two.yaml").write_text(text)
    command("merge", tmp_path / "two.yaml", tmp_path / "one")
    command("merge", tmp_path / "two.yaml", tmp_path / "two", "--intermediate-dir", tmp_path / "on_the_way")
    assert (tmp_path / "on_the_way" / "mid" / "model.safetensors").is_file()
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    recipe = json.loads((tmp_path / "one" / "twinmerge.json").read_text())["recipe"]
    assert recipe["models"][0]["model"]["recipe"]["merge_method"] == "average"
    (tmp_path / "two.yaml").write_text(text.replace("weight: 0.5}\n---", "weight: 0.4}\n---"))
    done = command("merge", tmp_path / "two.yaml", tmp_path / "three", "--intermediate-dir", tmp_path / "on_the_way")
    assert done.code == 4 and "was made by another recipe" in done.err
    (tmp_path / "two.yaml").write_text(text)
    shutil.copytree(zoo / "a", tmp_path / "a")
    (tmp_path / "own.yaml").write_text(text.replace(f"{zoo}/a", f"{tmp_path}/a"))
    again = ["merge", tmp_path / "own.yaml", tmp_path / "four", "--intermediate-dir", tmp_path / "others"]
    assert command(*again).code == 0 == command(*again, "--overwrite").code
    file = tmp_path / "a" / "model.safetensors"
    save_file({n: 1.5 * x for n, x in load_file(file).items()}, file, metadata={"format": "pt"})
    done = command(*again, "--overwrite")
    assert done.code == 4 and f"model.safetensors changed after {tmp_path}" in done.err.replace("\n", "")


def test_documents_that_all_have_names_go_to_folders_and_none_to_the_output(
    zoo: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    text = f"name: mid\nmerge_method: linear\nmodels: [{{model: {zoo}/a}}, {{model: {zoo}/b}}]\nparameters: {{weight: 1}}\n"
    (tmp_path / "two.yaml").write_text(f"{text}---\n{text.replace('mid', 'end').replace(f'{zoo}/a', 'mid')}")
    way, out = tmp_path / "way", tmp_path / "out"
    for last in ([out], ["-o", out]):
        done = command("merge", tmp_path / "two.yaml", *last, "--intermediate-dir", way)
        assert (
            done.code == 2 and "a name (mid, end), so each is written to" in done.err and f"Leave {out} out" in done.err
        )
        assert not way.exists() and not out.exists()
    done = command("merge", tmp_path / "two.yaml", "--intermediate-dir", way)
    assert f"Merged mid -> {way}/mid" in done.err and f"Merged end -> {way}/end" in done.err
    assert all((way / name / "model.safetensors").is_file() for name in ("mid", "end"))


def test_a_line_of_merge_is_checked_as_it_is(zoo: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    text = f"merge_method: slerp\nbase_model: {zoo}/a\nmodels: [{{model: {zoo}/a}}, {{model: {zoo}/b}}]\nparameters: {{t: 0.5}}\n"
    (tmp_path / "r.yaml").write_text(text)
    out, options = tmp_path / "out", ("--out-shard-size", "1B", "--device", "cpu", "--overwrite", "-p", "t=0.25")
    assert command("merge", tmp_path / "r.yaml", out).code == 0
    assert command("check", tmp_path / "r.yaml", out, *options).code == 0
    again = command("check", tmp_path / "r.yaml", out)
    assert again.code == 2 and "or add --overwrite (overwrite=True), since twinmerge wrote it" in again.err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert "--overwrite" not in command("merge", tmp_path / "r.yaml", tmp_path / "mine").err
    assert "t 0.25" in command("recipe", "explain", tmp_path / "r.yaml", "-p", "t=0.25").out


@pytest.mark.parametrize(
    "words",
    [
        ["--weight", "a=0.5", "--weight", "b=0.25"],
        ["-p", "weights={a: 0.5, b: 0.25}"],
        ["-p", "weight={a: 0.5, b: 0.25}"],
        ["-p", "a.weight=0.5", "-p", "b.weights=0.25"],
        ["-p", "weight=0.25", "-p", "a.weight=0.5"],
    ],
)
def test_every_spelling_of_a_weight_beside_a_file_and_among_options(
    zoo: Path, tmp_path: Path, command: Callable[..., Any], words: list[str]
) -> None:
    """Held to θ0 + 0.5 τa + 0.25 τb in float64."""
    head = f"base_model: {zoo}/base\nmodels:\n"
    models = "".join(f"  - {{name: {n}, model: {zoo}/{n}, parameters: {{weight: 3}}}}\n" for n in "ab")
    ours = f"twinmerge: 1\nmerge_method: task_arithmetic\n{head}{models}parameters: {{scale: 1}}\n"
    (tmp_path / "ours.yaml").write_text(ours)
    (tmp_path / "theirs.yaml").write_text(
        f"merge_method: task_arithmetic\n{head}{models.replace('name: a, ', '').replace('name: b, ', '')}"
    )
    options = ["--method", "task_arithmetic", "--base", zoo / "base", "-p", "scale=1"]
    options += [word for n in "ab" for word in ("--expert", f"{n}={zoo / n}")]
    base, a, b = (load_file(zoo / n / "model.safetensors") for n in ("base", "a", "b"))
    for given in ([tmp_path / "ours.yaml"], [tmp_path / "theirs.yaml"], options):
        done = command("merge", *given, *words, "-o", tmp_path / "out", "--overwrite")
        assert done.code == 0, done.err
        out = load_file(tmp_path / "out/model.safetensors")
        for name, x in base.items():
            wide = x.double() + 0.5 * (a[name].double() - x.double()) + 0.25 * (b[name].double() - x.double())
            assert torch.allclose(out[name].double(), wide, rtol=0, atol=1e-6)
        assert ("{" in words[-1]) == ("is read as" in done.err)


def test_wrong_spellings_of_a_weight(zoo: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    models = "".join(f"  - {{name: {n}, model: {zoo}/{n}}}\n" for n in "ab")
    recipe = tmp_path / "ours.yaml"
    recipe.write_text(f"twinmerge: 1\nmerge_method: ties\nbase_model: {zoo}/base\nmodels:\n{models}")
    options = ["--method", "ties", "--base", zoo / "base"]
    options += [word for n in "ab" for word in ("--expert", f"{n}={zoo / n}")]
    for given in ([recipe], options):
        for words, says in [
            (["-p", "weight.a=0.5"], "there is no expert 'weight'. Write -p a.weights=0.5."),
            (["-p", "weights={a: 0.5, x: 0.3}"], "has 'x', which is no expert. Write a.weights=0.5 for an expert"),
            (["-p", "scale={a: 0.5}"], "-p scale is one value for all experts."),
            (["-p", "weight=0.5", "-p", "weights=0.25"], "-p gives weights twice"),
            (["-p", "weights={a: 0.5}", "--weight", "a=1"], "-p a.weights and --weight are one parameter"),
            (["-p", "densty=1"], "ties has no parameter 'densty'"),
        ]:
            done = command("check", *given, *words)
            assert done.code == 2 and says in done.err.replace("\n", " "), done.err
