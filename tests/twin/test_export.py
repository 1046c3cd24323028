"""Ways out: stock transformers and stock PEFT answer as the twin does (checks 24 and 25; serving 19 and 20)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from twinmerge.errors import TwinmergeError
from twinmerge.maths.lowrank import Factors
from twinmerge.models.adapter_files import tied_weights
from twinmerge.models.transformers_class import TransformersArchitecture
from twinmerge.twin import export as export_module
from twinmerge.twin.export import VLLM_RANKS, _refuse_experts, export_dense, export_lora
from twinmerge.twin.split import Exclusive
from twinmerge.twin.twin import Twin

RANK = 4


def made(lab: Any, root: Path, names: tuple[str, ...], dtype: torch.dtype) -> dict[str, tuple[Any, Twin, Path]]:
    """Family -> its case (experts that moved matrices only), the twin read from its folder, the folder."""
    found = {}
    for name in names:
        case = lab.new_case(name, dtype)
        base = case.base.state_dict()
        for expert in case.experts.values():
            state = expert.state_dict()
            for key, tensor in state.items():
                own = base.get(key.removeprefix(case.family.prefix))
                if own is not None and own.shape == tensor.shape and (tensor.dim() < 2 or tensor.shape[0] == 1):
                    tensor.copy_(own)
            expert.load_state_dict(state)
        twin = Twin.build(case.base, case.experts, RANK, shared="task_arithmetic", progress=False)
        folder = twin.save_pretrained(root / name)
        found[name] = case, Twin.from_pretrained(folder), folder
    return found


@pytest.fixture(scope="module")
def cases(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Twin, Path]]:
    names = ("bert", "gpt2", "llama", "llama_tied", "vit")
    return made(lab, tmp_path_factory.mktemp("float32"), names, torch.float32)


@pytest.fixture(scope="module")
def exact(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Twin, Path]]:
    """In float64, where nothing but a mistake is larger than 1e-10."""
    return made(lab, tmp_path_factory.mktemp("float64"), ("bert", "llama"), torch.float64)


def carried(twin: Twin) -> Twin:
    """The twin whose experts leave alone what no adapter holds: norms and biases, and what several modules share."""
    tied = tied_weights(twin.package.shared.architecture)
    parts = {
        name: part._replace(low={n: f for n, f in part.low.items() if n not in tied}, dense={})
        for name, part in twin.package.exclusive.items()
    }
    return twin.with_package(twin.package_now()._replace(exclusive=parts))


def answer(lab: Any, model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return lab.stock_answer(model.eval()(**batch))


def stock(case: Any, folder: Path, labels: int | None) -> Any:
    if labels is not None:
        kind = type(case.experts["e0"])
        return kind.from_pretrained(folder / "shared", num_labels=labels)
    return type(case.base).from_pretrained(folder / "shared")


# ----------------------------------------------------------------------------------------------- dense


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "llama_tied"])
def test_check25_dense_weights_of_a_mixture_in_stock_transformers(
    lab: Any, cases: Any, tmp_path: Path, name: str
) -> None:
    """Check 25: saved and read again, logits are those of the mixture to 1e-6; safetensors only."""
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
    assert lab.relative(got, want) <= 1e-6
    assert json.loads((out / "twinmerge.json").read_text())["export"] == {"mixture": mixture, "head": head}
    assert [f.name for f in out.glob("*.safetensors")] == ["model.safetensors"]
    assert not [f for f in out.rglob("*") if f.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_check25_dense_weights_in_float64(lab: Any, exact: Any, tmp_path: Path, name: str) -> None:
    case, twin, _ = exact[name]
    mixture, head = {"e0": 0.75, "e2": 0.25}, "e2" if case.heads else None
    out = export_dense(twin, mixture, tmp_path / "out", head)
    kind = type(case.experts["e0"]) if case.heads else type(case.base)
    got = answer(lab, kind.from_pretrained(out), case.batch)
    with torch.no_grad():
        want = lab.answer(twin(**case.batch, mixture=mixture, **({"head": head} if head else {})))
    assert got.dtype == torch.float64 and (got - want).abs().max() <= 1e-10


def test_check25_nothing_is_written_into_the_models_folders(lab: Any, tmp_path: Path) -> None:
    """Check 25: the authors' code leaves its classifier heads in the user's folders."""
    case = lab.case("bert", torch.float32)
    for name, model in {"base": case.base, **case.experts}.items():
        model.save_pretrained(tmp_path / "given" / name)
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in (tmp_path / "given").rglob("*.*")}
    experts = {n: tmp_path / "given" / n for n in case.names}
    twin = Twin.build(tmp_path / "given" / "base", experts, RANK, progress=False)
    twin.save_pretrained(tmp_path / "twin")
    export_dense(twin, {"e0": 0.5, "e1": 0.5}, tmp_path / "dense", "e1")
    export_lora(twin, "e0", tmp_path / "lora")
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in (tmp_path / "given").rglob("*.*")} == before
    assert len(before) == 8
    with pytest.raises(TwinmergeError):
        export_dense(twin, {"e0": 1.0}, experts["e0"])
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in (tmp_path / "given").rglob("*.*")} == before


def test_check25_dense_without_a_head_is_the_bare_model(lab: Any, cases: Any, tmp_path: Path) -> None:
    _, twin, folder = cases["bert"]
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
    out = export_dense(twin, {"e1": 1.0}, tmp_path / "out")
    found, state = AutoModel.from_pretrained(out).state_dict(), twin.weights_for({"e1": 1.0})
    assert all(torch.equal(found[n], t) for n, t in state.items())
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*")} == before


# ------------------------------------------------------------------------------------------------ LoRA


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "llama", "llama_tied"])
def test_check24_serving19_an_expert_in_stock_peft(lab: Any, cases: Any, tmp_path: Path, name: str) -> None:
    """Check 24, serving 19: one-hot logits to 1e-5, a scaling of 1, and tensors in the file."""
    case, twin, folder = cases[name]
    found = export_lora(twin, "e1", tmp_path / "lora")
    base = stock(case, folder, 3 if case.heads else None)
    model = peft.PeftModel.from_pretrained(base, found.folder)
    with torch.no_grad():
        want = lab.answer(carried(twin)(**case.batch, expert="e1"))
    assert (answer(lab, model, case.batch) - want).abs().max() <= 1e-5
    table = {"gpt2": ["wte.weight"], "llama_tied": ["embed_tokens.weight"]}.get(name, [])
    assert found.rank == RANK and list(found.left_out) == found.tied == table
    assert all(f"Several modules share {n} (tied)" in (found.folder / "README.md").read_text() for n in table)
    assert load_file(found.folder / "adapter_model.safetensors")
    scalings = {m.scaling["default"] for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert scalings == {1.0}
    if not case.heads:
        assert (answer(lab, model.merge_and_unload(), case.batch) - want).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_check24_a_mixture_side_by_side_is_exact(lab: Any, cases: Any, tmp_path: Path, name: str) -> None:
    """Check 24: the "cat" mixture to 1e-6."""
    case, twin, folder = cases[name]
    mixture = {"e0": 0.55, "e1": 0.25, "e2": -0.15}
    found = export_lora(twin, mixture, tmp_path / "lora")
    assert found.rank == 3 * RANK
    body = AutoModel.from_pretrained(folder / "shared") if case.heads else stock(case, folder, None)
    model = peft.PeftModel.from_pretrained(body, found.folder)
    dense = type(body).from_pretrained(export_dense(carried(twin), mixture, tmp_path / "dense"))
    assert lab.relative(answer(lab, model, case.batch), answer(lab, dense, case.batch)) <= 1e-6


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_check24_a_mixed_batch_of_adapters_in_peft(lab: Any, cases: Any, tmp_path: Path, name: str) -> None:
    """Check 24: rows of one batch with adapters of their own, or none, to 1e-6."""
    case, twin, folder = cases[name]
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
        want = carried(twin)(**case.batch, mixture=weights).logits
    assert lab.relative(got, want) <= 1e-6


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_check24_adapters_in_float64(lab: Any, exact: Any, tmp_path: Path, name: str) -> None:
    """Check 24: an expert and a mixture, where float32 hides nothing."""
    case, twin, folder = exact[name]
    body = AutoModel.from_pretrained(folder / "shared") if case.heads else stock(case, folder, None)
    for mixture in ({"e1": 1.0}, {"e0": 0.5, "e1": 0.25, "e2": -0.125}):
        found = export_lora(twin, mixture, tmp_path / str(len(mixture)))
        dense = type(body).from_pretrained(export_dense(twin, mixture, tmp_path / f"dense{len(mixture)}"))
        model = peft.PeftModel.from_pretrained(
            AutoModel.from_pretrained(folder / "shared") if case.heads else body, found.folder
        )
        got, want = answer(lab, model, case.batch), answer(lab, dense, case.batch)
        assert got.dtype == torch.float64 and (got - want).abs().max() <= 1e-10
        body = AutoModel.from_pretrained(folder / "shared") if case.heads else stock(case, folder, None)


def loaded(case: Any, twin: Twin, folder: Path, where: Path, **options: Any) -> Any:
    """Stock PEFT with every expert's adapter on the shared model."""
    model: Any = stock(case, folder, None)
    for name in case.names:
        found = export_lora(twin, name, where / name, **options).folder
        if isinstance(model, peft.PeftModel):
            model.load_adapter(found, adapter_name=name)
        else:
            model = peft.PeftModel.from_pretrained(model, found, adapter_name=name)
    return model


def test_check24_serving20_cat_is_the_sum_and_linear_is_not(lab: Any, exact: Any, tmp_path: Path) -> None:
    """Check 24, serving 20: our mixture is Σ wt Δt in every matrix to 1e-6, where PEFT's "linear" is off by 70 % or
    more."""
    case, twin, folder = exact["llama"]
    weights = [0.5, 0.3, 0.2]
    model = loaded(case, twin, folder, tmp_path)
    model.load_adapter(
        export_lora(twin, dict(zip(case.names, weights, strict=True)), tmp_path / "ours").folder, adapter_name="ours"
    )
    model.add_weighted_adapter(case.names, weights, "linear", combination_type="linear")
    seen = 0
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            total = sum(w * module.get_delta_weight(n) for n, w in zip(case.names, weights, strict=True))
            assert lab.relative(module.get_delta_weight("ours"), total) <= 1e-6
            assert lab.relative(module.get_delta_weight("linear"), total) >= 0.7
            seen += 1
    assert seen == 15  # seven matrices in each of two layers, and the output layer
    source = Path(export_module.__file__).read_text()
    assert "add_weighted_adapter" not in source


def test_serving19_experts_load_in_arrow(lab: Any, cases: Any, tmp_path: Path) -> None:
    """Serving 19: PEFT's Arrow takes adapters of one rank on Linear layers, which those for vLLM are."""
    case, twin, folder = cases["llama"]
    paths = [str(export_lora(twin, n, tmp_path / n, server="vllm").folder) for n in case.names]
    model = peft.create_arrow_model(stock(case, folder, None), paths, peft.ArrowConfig(top_k=1))
    got = answer(lab, model, {"input_ids": case.batch["input_ids"]})
    assert bool(got.isfinite().all())
    assert (got - answer(lab, stock(case, folder, None), {"input_ids": case.batch["input_ids"]})).abs().max() > 1e-3


def test_check24_ranks_beyond_512_are_refused_for_vllm(cases: Any, tmp_path: Path) -> None:
    _, twin, _ = cases["llama"]
    wide = {
        name: part._replace(
            low={
                n: Factors(F.pad(f.b, (0, 200 - f.rank)), F.pad(f.a, (0, 0, 0, 200 - f.rank)))
                for n, f in part.low.items()
            }
        )
        for name, part in twin.package.exclusive.items()
    }
    large = Twin(twin.package._replace(exclusive=wide), twin.side_files)
    mixture = {"e0": 0.5, "e1": 0.3, "e2": 0.2}
    with pytest.raises(TwinmergeError, match="rank 600, vLLM takes 512 at most"):
        export_lora(large, mixture, tmp_path / "lora", server="vllm")
    assert list(tmp_path.iterdir()) == []
    assert export_lora(large, mixture, tmp_path / "lora").rank == 600
    assert export_lora(large, "e0", tmp_path / "one", server="vllm").rank == 256


def test_serving19_what_lora_cannot_carry_is_listed_with_its_share(lab: Any, tmp_path: Path) -> None:
    case = lab.new_case("bert", torch.float32)
    twin = Twin.build(case.base, case.experts, RANK, shared="task_arithmetic", progress=False)
    found = export_lora(twin, "e0", tmp_path / "lora", base="org/shared")
    part = twin.package.exclusive["e0"]
    assert found.left_out.keys() == {n for n, t in part.dense.items() if bool(t.any())}
    total = sum(f.energy() for f in part.low.values()) + sum(float(t.square().sum()) for t in part.dense.values())
    for name, share in found.left_out.items():
        assert share == pytest.approx(float(part.dense[name].square().sum()) / total, rel=1e-4)
    assert all(f"`{name}`" in (found.folder / "README.md").read_text() for name in found.left_out)


def test_check24_serving19_vllm_gets_ranks_that_it_takes_and_nothing_that_it_refuses(
    lab: Any, cases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, twin, folder = cases["llama"]
    mixture = {"e0": 0.6, "e1": 0.4, "e2": 0.1}
    found = export_lora(twin, mixture, tmp_path / "lora", server="vllm", base="org/shared")
    config = json.loads((found.folder / "adapter_config.json").read_text())
    assert found.rank == config["r"] == config["lora_alpha"] == 16 and config["r"] in VLLM_RANKS  # 12, padded
    assert not config["rank_pattern"] and config["modules_to_save"] is None and not config["use_dora"]
    assert config["bias"] == "none" and not config["use_rslora"]
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


def test_an_adapter_names_the_folder_of_its_twin_and_no_other(lab: Any, tmp_path: Path) -> None:
    """Until the twin is saved there is no model that PEFT could load the adapter on: the base and the first expert, where
    its tokenizer lies, are others."""
    case = lab.new_case("llama", torch.float32)
    for name, model in {"base": case.base, **case.experts}.items():
        model.save_pretrained(tmp_path / name)
    experts = {n: tmp_path / n for n in case.names}
    twin = Twin.build(tmp_path / "base", experts, RANK, shared="task_arithmetic", progress=False)
    assert twin.side_files is not None
    with pytest.raises(TwinmergeError, match=r"this twin was never saved. Save it first \(save_pretrained\), or name"):
        twin.export("e0", tmp_path / "out", lora=True)
    assert not (tmp_path / "out").exists()

    def named(exported: Any) -> str:
        card = (exported.folder / "README.md").read_text()
        found: str = json.loads((exported.folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert f"The base is `{found}`" in card
        return found

    assert named(twin.export("e0", tmp_path / "given", lora=True, base="org/shared")) == "org/shared"
    folder = twin.save_pretrained(tmp_path / "twin")
    read, small = Twin.from_pretrained(folder), twin.compress(rank=2, progress=False)
    for number, each in enumerate((twin, read, small, read.remove("e1"), copy.deepcopy(twin))):
        exported = each.export("e0", tmp_path / f"{number}", lora=True)
        assert named(exported) == str(folder / "shared")
        model = peft.AutoPeftModelForCausalLM.from_pretrained(exported.folder)
        with torch.no_grad():
            want = carried(each)(**case.batch, expert="e0").logits
        assert (answer(lab, model, case.batch) - want).abs().max() <= 1e-5
    folder.rename(tmp_path / "moved")
    with pytest.raises(TwinmergeError, match="this twin is no longer at .*twin. Save it"):
        twin.export("e0", tmp_path / "out", lora=True)
    assert named(Twin.from_pretrained(tmp_path / "moved").export("e0", tmp_path / "out", lora=True)).endswith(
        "moved/shared"
    )


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


@pytest.mark.parametrize("name", ["layers.0.mlp.experts.1.up_proj.weight", "layers.0.mlp.experts.down_proj"])
def test_experts_are_not_exported_for_vllm(lab: Any, name: str) -> None:
    """vLLM reads factors of experts in layouts that differ by model, so none is written; other matrices are no
    matter."""
    import transformers

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 9,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "num_experts": 2}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **heads))

    def twin(changed: str) -> Any:
        shared = SimpleNamespace(
            architecture=TransformersArchitecture(model.config, type(model)), stored={changed: f"model.{changed}"}
        )
        parts = {"a": Exclusive({changed: Factors(torch.ones(8, 1), torch.ones(1, 8))}, {}, {})}
        return SimpleNamespace(package=SimpleNamespace(shared=shared, exclusive=parts))

    with pytest.raises(TwinmergeError, match="a changes the experts' matrices .* --server peft"):
        _refuse_experts(twin(name), {"a": 1.0})
    _refuse_experts(twin("layers.0.self_attn.q_proj.weight"), {"a": 1.0})
