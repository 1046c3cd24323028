"""A tie is believed by value: what stock transformers makes of a folder, the merge is a merge of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from twinmerge.engine.merge import Merge
from twinmerge.errors import TwinmergeError
from twinmerge.models.opening import open_model
from twinmerge.recipes.recipe import Recipe

SIZES = {"vocab_size": 24, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
TWO_SIDED = {
    "vocab_size": 24,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
FAMILIES: dict[
    str, tuple[dict[str, Any], str, tuple[str, ...]]
] = {  # class -> sizes, the table, what may be tied to it
    "LlamaForCausalLM": (SIZES, "model.embed_tokens.weight", ("lm_head.weight",)),
    "GPT2LMHeadModel": (
        {
            "vocab_size": 24,
            "n_embd": 8,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": 16,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        "transformer.wte.weight",
        ("lm_head.weight",),
    ),
    "BertForMaskedLM": (SIZES, "bert.embeddings.word_embeddings.weight", ("cls.predictions.decoder.weight",)),
    "T5ForConditionalGeneration": (
        {
            "vocab_size": 24,
            "d_model": 8,
            "d_kv": 4,
            "d_ff": 12,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        "shared.weight",
        ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    ),
    "BartForConditionalGeneration": (
        TWO_SIDED,
        "model.shared.weight",
        ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
    ),
    "MarianMTModel": (
        TWO_SIDED,
        "model.shared.weight",
        ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
    ),
}
LAYOUTS = ("tied", "only the output", "both, equal", "both, different", "untied", "untied, equal")
WORDS = torch.arange(2, 10)[None]


def folder(root: Path, name: str, layout: str, seed: int) -> str:
    """A model of one base and a small change of its own, saved as the layout says."""
    model_class = getattr(transformers, name)
    sizes, table, others = FAMILIES[name]
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**sizes, tie_word_embeddings=True))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter += 0.02 * torch.randn(parameter.shape, generator=rng)
    out = root / f"{layout} {seed}"
    model.save_pretrained(out)
    file, config = out / "model.safetensors", out / "config.json"
    tensors = load_file(file)
    value = next(tensors.pop(n) for n in (table, *others) if n in tensors)
    other = value + 0.1 * torch.randn(value.shape, generator=rng)
    if layout == "only the output":
        tensors[others[0]] = value
    else:
        tensors[table] = value
        if layout != "tied":
            tensors[others[0]] = value.clone() if "equal" in layout else other
    if layout.startswith("untied"):
        raw = json.loads(config.read_text())
        config.write_text(json.dumps({**raw, "tie_word_embeddings": False}))
        for extra in others[1:]:  # which are read from the file then
            tensors[extra] = value.clone()
        if "cls.predictions.bias" in tensors:
            tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"] + 0.1
    save_file(tensors, file, {"format": "pt"})
    return str(out)


def stock(name: str, path: str | Path) -> tuple[dict[str, torch.Tensor], Any]:
    model, info = getattr(transformers, name).from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    return dict(model.state_dict()), model.eval()


def logits(model: Any) -> torch.Tensor:
    words = {"decoder_input_ids": WORDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(WORDS, **words).logits


def check(tmp_path: Path, name: str, base: str, expert: str) -> bool:
    """Whether the merge is made; if so, it is the merge of what stock transformers loads."""
    paths = [folder(tmp_path, name, base, 1), folder(tmp_path, name, expert, 2), folder(tmp_path, name, expert, 3)]
    merge = Merge(Recipe("task_arithmetic", paths[0], {"a": paths[1], "b": paths[2]}, {"scale": 0.5}), progress=False)
    try:
        merge.matched  # noqa: B018
    except TwinmergeError as error:
        if "ties it to" in str(error):
            return False
        raise
    merge.save(tmp_path / "out")
    (base_state, by_hand), a, b = stock(name, paths[0]), stock(name, paths[1])[0], stock(name, paths[2])[0]
    merged, model = stock(name, tmp_path / "out")
    wanted = {n: t + 0.5 * (a[n] - t) + 0.5 * (b[n] - t) for n, t in base_state.items()}
    assert wanted.keys() == merged.keys()
    for n, t in wanted.items():
        torch.testing.assert_close(merged[n], t, rtol=1e-5, atol=1e-6, msg=n)
    for n in [n for n, _ in by_hand.named_parameters(remove_duplicate=False)]:
        parent, _, leaf = n.rpartition(".")
        setattr(by_hand.get_submodule(parent), leaf, torch.nn.Parameter(wanted[n], requires_grad=False))
    torch.testing.assert_close(logits(model), logits(by_hand), rtol=1e-4, atol=1e-5)
    return True


UNTIED = ("both, different", "untied")
QUICK = [("both, different", "both, different"), ("tied", "both, different"), ("both, different", "tied")]


@pytest.mark.few(4)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration"])
@pytest.mark.parametrize(("base", "expert"), QUICK)
def test_a_tie_is_what_stock_transformers_makes_of_the_file(tmp_path, name, base, expert):
    assert check(tmp_path, name, base, expert) is (base in UNTIED or expert not in UNTIED)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("base", LAYOUTS)
@pytest.mark.parametrize("expert", LAYOUTS)
def test_every_pair_of_layouts(tmp_path, name, base, expert):
    made = check(tmp_path, name, base, expert)
    assert made or base not in UNTIED or (name == "BertForMaskedLM" and expert.startswith("untied"))  # its own bias


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration"])
def test_what_runs_here_is_not_tied_either(tmp_path, name):
    """BERT's bias stays tied while its output layer is not."""
    paths = [folder(tmp_path, name, "both, different", seed) for seed in (1, 2)]
    recipe = Recipe("task_arithmetic", paths[0], {"a": paths[1]}, {"scale": 1.0})
    model = Merge(recipe, progress=False).load()
    torch.testing.assert_close(logits(model), logits(stock(name, paths[1])[1]), rtol=1e-4, atol=1e-5)
    loaded = stock(name, paths[1])[1]
    in_memory = Merge(Recipe("average", None, {"a": loaded, "b": loaded}, {}), progress=False).load()
    torch.testing.assert_close(logits(in_memory), logits(loaded), rtol=1e-4, atol=1e-5)


def test_a_tie_that_differs_in_dtype_or_in_its_last_element(tmp_path):
    path = Path(folder(tmp_path, "LlamaForCausalLM", "both, equal", 1))
    tensors = load_file(path / "model.safetensors")
    head = tensors["lm_head.weight"].bfloat16()
    for table, tied in ((head.float(), True), (head.float() + torch.eye(24, 8).roll(-1, 0) * 0.01, False)):
        tensors |= {"lm_head.weight": head, "model.embed_tokens.weight": table}
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        assert bool(open_model(str(path)).aliases) is tied
