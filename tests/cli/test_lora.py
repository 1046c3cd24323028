"""`twinmerge lora merge` and `twinmerge lora extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from twinmerge.models.adapter import read_adapter


@pytest.fixture(scope="module")
def adapters(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate({"a": 2, "b": 3}.items()):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        peft.get_peft_model(GPT2LMHeadModel.from_pretrained(zoo.lm), config).save_pretrained(root / name)
    return {name: root / name for name in "ab"}


def given(adapters: dict[str, Path]) -> list[str]:
    return [word for name, folder in adapters.items() for word in ("--expert", f"{name}={folder}")]


def test_merge(command: Any, zoo: Any, adapters: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--base", zoo.lm, *given(adapters), "--weight", "a=0.5", "--weight", "b=-2", "--scale", 0.5, "-o", out]
    ran = command("lora", "merge", *words)
    assert (ran.code, ran.out) == (0, "") and ran.err.startswith("Merged 1 matrices, rank 5, ")
    (name,) = read_adapter(out).factors
    parts = {n: read_adapter(path).factors[name].dense() for n, path in adapters.items()}
    torch.testing.assert_close(
        read_adapter(out).factors[name].dense(), 0.25 * parts["a"] - parts["b"], rtol=0, atol=1e-6
    )
    again = command("lora", "merge", *words)
    assert again.code == 2 and "there already and not empty" in again.err


def test_merge_dry_run_and_json(command: Any, zoo: Any, adapters: Any, tmp_path: Path) -> None:
    words = ["lora", "merge", "--base", zoo.lm, *given(adapters), "--rank", 4, "-o", tmp_path / "out"]
    ran = command(*words, "--dry-run")
    assert ran.code == 0 and "h.0.attn.c_attn.weight" in ran.out and "Nothing is written" in ran.out
    told = command(*words, "--dry-run", "--json").json()
    assert told["output"] is None and told["ranks"] == {"h.0.attn.c_attn.weight": 4}
    assert list(tmp_path.iterdir()) == []
    told = command(*words, "--json").json()
    assert told["output"] == str(tmp_path / "out") and 0.5 < told["energy"]["h.0.attn.c_attn.weight"] < 1


def test_merge_by_a_method_with_parameters(command: Any, zoo: Any, adapters: Any, tmp_path: Path) -> None:
    words = ["lora", "merge", "--base", zoo.lm, *given(adapters), "--method", "tsv", "--dtype", "bfloat16"]
    assert command(*words, "-p", "scale=0.5", "--energy", 0.99, "-o", tmp_path / "out").code == 0
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors and {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_every_spelling_of_a_weight(command: Any, zoo: Any, adapters: Any, tmp_path: Path) -> None:
    """Held to 0.5 Ba Aa + 0.25 Bb Ab times their scales."""
    found = []
    for i, words in enumerate(
        [
            ["--weight", "a=0.5", "--weight", "b=0.25"],
            ["-p", "weight={a: 0.5, b: 0.25}"],
            ["-p", "a.weight=0.5", "-p", "b.weights=0.25"],
            ["-p", "weight=0.25", "--weight", "a=0.5"],
        ]
    ):
        out = tmp_path / str(i)
        ran = command("lora", "merge", "--base", zoo.lm, *given(adapters), *words, "-o", out)
        assert ran.code == 0, ran.err
        tensors = load_file(out / "adapter_model.safetensors")
        found.append(
            {n[: -len(".lora_A.weight")]: _product(tensors, n) for n in tensors if n.endswith("lora_A.weight")}
        )
    parts = [load_file(folder / "adapter_model.safetensors") for folder in adapters.values()]
    for name, got in found[0].items():
        wide = sum(
            by * (8 / r) * _product(part, f"{name}.lora_A.weight")
            for by, r, part in zip((0.5, 0.25), (2, 3), parts, strict=True)
        )
        assert torch.allclose(got, wide, atol=1e-5) and all(torch.equal(got, other[name]) for other in found)


def _product(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()


def test_extract(command: Any, zoo: Any, tmp_path: Path) -> None:
    ran = command("lora", "extract", zoo.alice, "--base", zoo.lm, "--energy", 0.9, "-o", tmp_path / "out")
    assert ran.code == 0 and "Extracted 5 matrices, ranks " in ran.err and "Least kept: 9" in ran.err
    assert "ln_f.weight" in ran.out and "No adapter can carry these" in ran.out
    assert "Several modules share wte.weight (tied), and PEFT would add a change once for each" in ran.err
    told = command("lora", "extract", zoo.alice, "--base", zoo.lm, "--rank", 2, "--json", "-o", tmp_path / "two").json()
    assert set(told["ranks"].values()) == {2} and told["saved"] == [] and told["bytes"] > 1000
    assert peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(zoo.lm), tmp_path / "two")


def test_extract_a_classifier(command: Any, zoo: Any, tmp_path: Path) -> None:
    ran = command("lora", "extract", zoo.mood, "--base", zoo.base, "--rank", 2, "-o", tmp_path / "out")
    assert ran.code == 0 and "In full: classifier." in ran.err
    refused = command("lora", "merge", "--base", zoo.base, "--expert", f"a={tmp_path / 'out'}", "-o", tmp_path / "m")
    assert refused.code == 3 and "trained in full" in refused.err and "--drop-heads" in refused.err
    words = ["lora", "merge", "--base", zoo.base, "--expert", f"a={tmp_path / 'out'}", "--drop-heads"]
    dropped = command(*words, "-o", tmp_path / "m")
    assert dropped.code == 0 and "Warning: Left out of the merged adapter" in dropped.err


@pytest.mark.parametrize(
    "words, says",
    [
        (["merge", "-o", "x"], "No base is named"),
        (["extract", "m", "-o", "x"], "No base is named"),
        (["merge", "--base", "no/model/here", "--expert", "a=b", "-o", "x"], "No model at 'no/model/here'"),
        (["merge", "--base", "b", "--expert", "a=b", "--method", "ties", "-o", "x"], "ties does not merge"),
        (["merge", "--base", "b", "--expert", "a=b", "--rank", "2", "--energy", "0.5", "-o", "x"], "Both a rank"),
        (["extract", "m", "--base", "b", "--energy", "2", "-o", "x"], "The energy is 2.0"),
        (["merge", "--base", "b", "--expert", "ab", "-o", "x"], "--expert 'ab' is not name=value"),
    ],
)
def test_mistakes(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str) -> None:
    monkeypatch.chdir(tmp_path)
    ran = command("lora", *words)
    assert (
        ran.code == (3 if "no/model/here" in words else 2)
        and ran.out == ""
        and ran.err.startswith("Error: ")
        and says in ran.err
    )
    assert list(tmp_path.iterdir()) == []


def test_names_of_peft_that_trim_products_are_refused_and_default_scales_told(
    command: Any, zoo: Any, tmp_path: Path
) -> None:
    ran = command("lora", "merge", "--method", "Ties-SVD", "--base", zoo.base, "--expert", "a=no", "-o", tmp_path / "o")
    assert ran.code == 2 and "picks entries of the products B A" in ran.err and not (tmp_path / "o").exists()
