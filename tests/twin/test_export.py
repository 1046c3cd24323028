"""Ways out: stock transformers and stock PEFT answer as the twin does (checks 24 and 25 of the specification)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from twinmerge.errors import TwinmergeError
from twinmerge.twin import export as export_module
from twinmerge.twin.export import VLLM_RANKS, export_dense, export_lora
from twinmerge.twin.twin import Twin

RANK = 4


@pytest.fixture(scope="module")
def cases(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Twin, Path]]:
    """Family -> its case (experts that moved matrices only), the twin read from its folder, the folder."""
    made = {}
    for name in ("bert", "gpt2", "llama", "llama_tied", "vit"):
        case = lab.new_case(name, torch.float32)
        base = case.base.state_dict()
        for expert in case.experts.values():
            state = expert.state_dict()
            for key, tensor in state.items():
                own = base.get(key.removeprefix(case.family.prefix))
                if own is not None and own.shape == tensor.shape and (tensor.dim() < 2 or tensor.shape[0] == 1):
                    tensor.copy_(own)
            expert.load_state_dict(state)
        twin = Twin.build(case.base, case.experts, RANK, shared="task_arithmetic", progress=False)
        folder = twin.save_pretrained(tmp_path_factory.mktemp(name) / "twin")
        made[name] = case, Twin.from_pretrained(folder), folder
    return made


def answer(lab: Any, model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return lab.stock_answer(model.eval()(**batch))


def stock(case: Any, folder: Path, labels: int | None) -> Any:
    if labels is not None:
        kind = type(case.experts["e0"])
        return kind.from_pretrained(folder, num_labels=labels)
    return type(case.base).from_pretrained(folder)


# ----------------------------------------------------------------------------------------------- dense


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "llama_tied"])
def test_dense_weights_of_a_mixture_in_stock_transformers(lab: Any, cases: Any, tmp_path: Path, name: str) -> None:
    case, twin, _ = cases[name]
    mixture = {"e0": 0.7, "e2": 0.3}
    head = "e2" if case.heads else None
    out = export_dense(twin, mixture, tmp_path / "out", head)
    kind = AutoModelForCausalLM if not case.heads else None
    if case.heads:
        kind = AutoModelForSequenceClassification if name == "bert" else type(case.experts["e0"])
    got = answer(lab, kind.from_pretrained(out), case.batch)
    with torch.no_grad():
        want = lab.answer(twin(**case.batch, mixture=mixture, **({"head": head} if head else {})))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-6)
    assert json.loads((out / "twinmerge.json").read_text())["export"] == {"mixture": mixture, "head": head}
    assert [f.name for f in out.glob("*.safetensors")] == ["model.safetensors"]


def test_dense_without_a_head_is_the_bare_model(lab: Any, cases: Any, tmp_path: Path) -> None:
    _, twin, folder = cases["bert"]
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
    out = export_dense(twin, {"e1": 1.0}, tmp_path / "out")
    found, state = AutoModel.from_pretrained(out).state_dict(), twin.weights_for({"e1": 1.0})
    assert all(torch.equal(found[n], t) for n, t in state.items())
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*")} == before


# ------------------------------------------------------------------------------------------------ LoRA


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "llama", "llama_tied"])
def test_an_expert_in_stock_peft(lab: Any, cases: Any, tmp_path: Path, name: str) -> None:
    case, twin, folder = cases[name]
    found = export_lora(twin, "e1", tmp_path / "lora")
    base = stock(case, folder, 3 if case.heads else None)
    model = peft.PeftModel.from_pretrained(base, found.folder)
    with torch.no_grad():
        want = lab.answer(twin(**case.batch, expert="e1"))
    torch.testing.assert_close(answer(lab, model, case.batch), want, rtol=1e-4, atol=1e-5)
    assert found.rank == RANK and not found.left_out
    assert load_file(found.folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_mixture_side_by_side_is_exact(lab: Any, cases: Any, tmp_path: Path, name: str) -> None:
    case, twin, folder = cases[name]
    mixture = {"e0": 0.55, "e1": 0.25, "e2": -0.15}
    found = export_lora(twin, mixture, tmp_path / "lora")
    assert found.rank == 3 * RANK
    body = AutoModel.from_pretrained(folder) if case.heads else stock(case, folder, None)
    model = peft.PeftModel.from_pretrained(body, found.folder)
    dense = type(body).from_pretrained(export_dense(twin, mixture, tmp_path / "dense"))
    torch.testing.assert_close(answer(lab, model, case.batch), answer(lab, dense, case.batch), rtol=1e-4, atol=1e-5)


def test_a_mixed_batch_of_adapters_in_peft(lab: Any, cases: Any, tmp_path: Path) -> None:
    case, twin, folder = cases["llama"]
    model: Any = stock(case, folder, None)
    for name in case.names:
        where = export_lora(twin, name, tmp_path / name).folder
        if name == "e0":
            model = peft.PeftModel.from_pretrained(model, where, adapter_name=name)
        else:
            model.load_adapter(where, adapter_name=name)
    owners = ["e2", "__base__", "e0", "e1", "e0"]
    with torch.no_grad():
        got = model.eval()(**case.batch, adapter_names=owners).logits
        weights = torch.tensor([[float(n == o) for n in case.names] for o in owners])
        want = twin(**case.batch, mixture=weights).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_what_lora_cannot_carry_is_listed_with_its_share(lab: Any, tmp_path: Path) -> None:
    case = lab.new_case("bert", torch.float32)
    twin = Twin.build(case.base, case.experts, RANK, shared="task_arithmetic", progress=False)
    found = export_lora(twin, "e0", tmp_path / "lora")
    part = twin.package.exclusive["e0"]
    assert found.left_out.keys() == {n for n, t in part.dense.items() if bool(t.any())}
    total = sum(f.energy() for f in part.low.values()) + sum(float(t.square().sum()) for t in part.dense.values())
    for name, share in found.left_out.items():
        assert share == pytest.approx(float(part.dense[name].square().sum()) / total, rel=1e-4)
    assert all(f"`{name}`" in (found.folder / "README.md").read_text() for name in found.left_out)


def test_vllm_gets_ranks_that_it_takes_and_nothing_that_it_refuses(
    lab: Any, cases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, twin, folder = cases["llama"]
    mixture = {"e0": 0.6, "e1": 0.4, "e2": 0.1}
    found = export_lora(twin, mixture, tmp_path / "lora", server="vllm", base="org/shared")
    config = json.loads((found.folder / "adapter_config.json").read_text())
    assert found.rank == config["r"] == config["lora_alpha"] == 16 and config["r"] in VLLM_RANKS  # 12, padded
    assert not config["rank_pattern"] and config["modules_to_save"] is None and not config["use_dora"]
    assert config["base_model_name_or_path"] == "org/shared"
    tensors = load_file(found.folder / "adapter_model.safetensors")
    assert all(16 in t.shape and "embedding" not in n for n, t in tensors.items())
    assert "embed_tokens.weight" in {n.removeprefix("model.") for n in found.left_out}
    model = peft.PeftModel.from_pretrained(stock(case, folder, None), found.folder)
    assert bool(answer(lab, model, case.batch).isfinite().all())
    monkeypatch.setattr(export_module, "VLLM_RANKS", (1, 8))
    with pytest.raises(TwinmergeError, match="rank 12, vLLM takes 8 at most"):
        export_lora(twin, mixture, tmp_path / "more", server="vllm")
    assert not (tmp_path / "more").exists() and not (tmp_path / "more.partial").exists()


def test_names_and_weights_that_cannot_be(cases: Any, tmp_path: Path) -> None:
    _, twin, _ = cases["bert"]
    for call, says in (
        (lambda: export_lora(twin, "e9", tmp_path / "x"), "no expert 'e9'"),
        (lambda: export_dense(twin, {"e0": float("nan")}, tmp_path / "x"), "NaN or infinity"),
        (lambda: export_dense(twin, {"e0": 1.0}, tmp_path / "x", head="e9"), "no expert 'e9'"),
        (lambda: export_lora(twin, {"e0": 0.0}, tmp_path / "x"), "Nothing that no expert adds"),
    ):
        with pytest.raises(TwinmergeError, match=says):
            call()
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- hub


def test_push_to_hub_uploads_the_folder(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, twin, folder = cases["bert"]
    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            seen["token"] = token

        def create_repo(self, repo: str, **options: Any) -> None:
            seen["made"] = repo, options

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
            seen["files"] = {str(f.relative_to(folder_path)) for f in folder_path.rglob("*") if f.is_file()}
            return f"hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert twin.push_to_hub("me/twin", private=True, token="t") == "hub/me/twin"
    assert seen["token"] == "t" and seen["made"] == ("me/twin", {"private": True, "exist_ok": True})
    assert seen["files"] == {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
