"""PEFT's names of merging: what they give here is what PEFT gives, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import twinmerge as tm
from twinmerge.cli import main
from twinmerge.errors import UsageError

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20}
CONFIG = LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=False)
RANK = 2
FULL = 3 * RANK  # of the sum of the adapters; a trimmed sum has more, so it is cut at the matrices' own


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    root, experts = tmp_path_factory.mktemp("names"), {}
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(root / "base")
    for name in "abc":
        options = peft.LoraConfig(
            r=RANK, lora_alpha=4, init_lora_weights=False, target_modules=["q_proj", "up_proj", "down_proj"]
        )
        peft.get_peft_model(LlamaForCausalLM.from_pretrained(root / "base"), options).save_pretrained(root / name)
        experts[name] = str(root / name)
    return str(root / "base"), experts


def theirs(zoo: tuple[str, dict[str, str]], kind: str, weights: list[float], **options: Any) -> dict[str, Tensor]:
    base, experts = zoo
    first, *others = experts
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), experts[first], adapter_name=first)
    for name in others:
        model.load_adapter(experts[name], adapter_name=name)
    model.add_weighted_adapter(list(experts), weights, adapter_name="all", combination_type=kind, **options)
    model.set_adapter("all")
    return dict(model.merge_and_unload().state_dict())


@pytest.mark.parametrize(
    ("kind", "options", "svd"),
    [
        ("cat", {}, {}),
        ("svd", {}, {"svd_rank": FULL}),
        ("ties_svd", {"density": 0.4}, {"svd_rank": 16}),
        ("magnitude_prune_svd", {"density": 0.4}, {"svd_rank": 16}),
        ("dare_linear_svd", {"density": 1.0}, {"svd_rank": 16}),
        ("dare_ties_svd", {"density": 1.0}, {"svd_rank": 16}),
    ],
)
def test_names_give_what_peft_gives(zoo: Any, kind: str, options: dict[str, Any], svd: dict[str, int]) -> None:
    base, experts = zoo
    wanted = theirs(zoo, kind, [1.0, 1.0, 1.0], **options, **svd)
    for word in (kind, kind.upper().replace("_", "-")):
        found = tm.merge(word, base, experts, **options).load().state_dict()
        for name, tensor in wanted.items():
            assert torch.allclose(found[name], tensor, atol=2e-5), (word, name)
    start = LlamaForCausalLM.from_pretrained(base).state_dict()
    assert any((wanted[name] - start[name]).abs().max() > 0.05 for name in wanted)


def test_weights_of_sums_are_those_of_peft(zoo: Any) -> None:
    base, experts = zoo
    weights = {"a": 0.7, "b": 0.3, "c": -0.4}
    for kind, svd in (("cat", {}), ("svd", {"svd_rank": FULL}), ("magnitude_prune_svd", {"svd_rank": 16})):
        density = {"density": 0.4} if kind.startswith("magnitude") else {}
        signs = {} if kind == "svd" or not density else density
        wanted = theirs(zoo, kind, [0.7, 0.3, -0.4], **signs, **svd)
        found = tm.merge(kind, base, experts, weights=weights, **density).load().state_dict()
        for name, tensor in wanted.items():
            assert torch.allclose(found[name], tensor, atol=2e-5), (kind, name)


def test_what_is_said_beside_a_name_counts(zoo: Any) -> None:
    base, experts = zoo
    assert tm.merge("cat", base, experts, scale=0.5).recipe.parameters == {"scale": 0.5}
    assert tm.merge("ties_svd", base, experts, scope="model").recipe.parameters == {"scope": "model"}
    written = tm.merge("dare_linear", base, experts).recipe
    assert written.method == "dare" and written.parameters == {"scale": 1.0}  # as of PEFT, and of mergekit
    assert tm.merge("task_arithmetic", base, experts).recipe.parameters == {}


def test_the_command_says_what_a_name_stands_for(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, experts = zoo
    words = ["merge", "--method", "Ties-SVD", "--base", base, *(f"--expert={n}={f}" for n, f in experts.items())]
    monkeypatch.setattr("sys.argv", ["twinmerge", *words, "-p", "density=0.4", "-o", str(tmp_path / "out")])
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    assert "Note: PEFT's Ties-SVD is ties here, with -p scope=tensor." in capsys.readouterr().err
    found = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    wanted = theirs(zoo, "ties_svd", [1.0, 1.0, 1.0], density=0.4, svd_rank=16)
    assert all(torch.allclose(found[name], tensor, atol=2e-5) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    "kind", ["ties_svd", "dare_ties_svd", "dare_linear_svd", "magnitude_prune", "Magnitude-Prune-SVD"]
)
def test_among_factors_names_of_trims_are_refused(zoo: Any, kind: str) -> None:
    base, experts = zoo
    with pytest.raises(UsageError, match="picks entries of the products B A"):
        tm.merge_lora(base, experts, method=kind, rank=4)
