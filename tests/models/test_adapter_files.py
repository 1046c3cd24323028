"""What PEFT reads back of the adapters that we write: ranks by name, kinds of modules, heads."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from twinmerge.maths.lowrank import Factors
from twinmerge.models.adapter import read_adapter
from twinmerge.models.adapter_files import (
    MATRICES,
    adaptable,
    adapter_config,
    carried,
    lora_tensors,
    pattern_of,
    saved_modules,
    task_of,
    write_adapter,
)
from twinmerge.models.transformers_class import TransformersArchitecture


class Net(nn.Module):
    """Modules whose names are the ends of others' names, of every kind that LoRA knows, and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.block = nn.ModuleDict({"first": nn.Linear(6, 3), "block": nn.ModuleDict({"first": nn.Linear(3, 5)})})
        self.table = nn.Embedding(7, 4)
        self.image = nn.Conv2d(3, 4, (2, 3))
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.turned = Conv1D(6, 4)
        self.norm = nn.LayerNorm(4)


def of(net: nn.Module) -> Any:
    """What the writer asks of an architecture."""
    return SimpleNamespace(skeleton=net, aliases={}, of_module=str, model_class=type(net))


def factors(m: int, n: int, rank: int, seed: int) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(m, rank, generator=rng), torch.randn(rank, n, generator=rng))


def written(folder: Path, net: nn.Module, low: dict[str, Factors]) -> None:
    folder.mkdir()
    modules = carried(of(net), low)
    tensors = {name: tensor.contiguous() for name, tensor in lora_tensors(modules).items()}
    write_adapter(folder, tensors, adapter_config(of(net), modules, [], "a base"))


def loaded(folder: Path, net: nn.Module) -> dict[str, torch.Tensor]:
    return dict(peft.PeftModel.from_pretrained(net, folder).merge_and_unload().state_dict())


def test_every_kind_of_module_and_nothing_else() -> None:
    found = adaptable(of(Net()))
    assert found.keys() == {"first", "block.first", "block.block.first", "table", "image", "turned"}
    assert adaptable(of(Net()), MATRICES).keys() == {"first", "block.first", "block.block.first", "turned"}
    assert {path: name for path, (name, _) in found.items()} == {path: f"{path}.weight" for path in found}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_peft_adds_exactly_the_factors_to_modules_whose_names_end_alike(tmp_path: Path) -> None:
    """Ranks 2, 3, 4 on first, block.first, block.block.first: each by its own pattern, with a scaling of 1."""
    low = {
        "first.weight": factors(6, 4, 2, 0),
        "block.first.weight": factors(3, 6, 3, 1),
        "block.block.first.weight": factors(5, 3, 4, 2),
        "table.weight": factors(7, 4, 1, 3),
        "image.weight": factors(4, 18, 2, 4),
        "turned.weight": factors(4, 6, 2, 5),
    }
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    written(tmp_path / "a", net, low)
    back = read_adapter(tmp_path / "a")
    assert {n: f.rank for n, f in back.factors.items()} == {n: f.rank for n, f in low.items()} and not back.dense
    after = loaded(tmp_path / "a", net)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        add = low[name].dense().reshape(tensor.shape) if name in low else torch.zeros_like(tensor)
        torch.testing.assert_close(after[name], tensor + add, rtol=0, atol=2e-6)


def test_a_module_that_is_not_carried_stays_untouched(tmp_path: Path) -> None:
    """PEFT takes a target's name for the end of a name: `first` alone would also wrap block.first."""
    net = Net()
    written(tmp_path / "a", net, {"first.weight": factors(6, 4, 2, 0)})
    model = peft.PeftModel.from_pretrained(net, tmp_path / "a")
    wrapped = {n for n, m in model.get_base_model().named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert wrapped == {"first"}


@pytest.mark.parametrize("name", ["first", "a.b", "a_b.c", "layers.1.q", "x+y"])
def test_a_pattern_matches_one_name_only(name: str) -> None:
    others = [f"block.{name}", f"{name}.more", f"my{name}", name.replace(".", "_"), name.replace("1", "11")]
    keys = [pattern_of(name)]
    assert get_pattern_key(keys, name) == keys[0]
    for other in set(others) - {name}:
        assert get_pattern_key(keys, other) == other
    assert re.fullmatch(pattern_of(name), name)


def test_a_head_is_saved_as_the_largest_module_that_is_all_head(build: Any) -> None:
    roberta = build("RobertaForSequenceClassification", num_labels=3)
    found = TransformersArchitecture(roberta.config, type(roberta))
    head = {name for name in found.parameters if not found.is_body(name)}
    keys = [key for key in roberta.state_dict() if key.startswith("classifier.")]
    assert len(head) == 4 and saved_modules(found, head) == {"classifier": keys}
    assert saved_modules(found, head - {"classifier.dense.bias"}).keys() == {"classifier.dense", "classifier.out_proj"}
    bert = build("BertForSequenceClassification")
    pooled = saved_modules(
        TransformersArchitecture(bert.config, type(bert)),
        {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight"},
    )
    assert pooled.keys() == {"bert.pooler", "classifier"}
    assert saved_modules(found, set()) == {}


def test_a_tied_tensor_does_not_split_a_saved_module(build: Any) -> None:
    masked = build("BertForMaskedLM")
    found = TransformersArchitecture(masked.config, type(masked))
    head = {n for n in found.parameters if not found.is_body(n) and n not in found.aliases}
    saved = saved_modules(found, head)
    assert saved.keys() == {"cls"} and "cls.predictions.decoder.weight" in saved["cls"]


def test_a_roberta_head_out_of_a_twin_loads_in_peft(build: Any, tuned: Any, with_body_of: Any, tmp_path: Path) -> None:
    import twinmerge as tm
    from twinmerge.twin.export import export_lora

    base = build("RobertaModel")
    kind = "RobertaForSequenceClassification"
    experts = {n: with_body_of(build(kind, seed, num_labels=3), base) for seed, n in enumerate("ab", 1)}
    for seed, expert in enumerate(experts.values()):
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            expert.roberta.encoder.layer[0].output.dense.weight += 0.1 * torch.randn(16, 16, generator=rng)
    twin = tm.Twin.build(base, experts, 16, progress=False)
    twin.save_pretrained(tmp_path / "twin")
    found = export_lora(twin, "a", tmp_path / "lora")
    stock = type(experts["a"]).from_pretrained(tmp_path / "twin" / "shared", num_labels=3)
    batch = {"input_ids": torch.tensor([[4, 5, 6, 7]])}
    with torch.no_grad():
        got = peft.PeftModel.from_pretrained(stock, found.folder).eval()(**batch).logits
        torch.testing.assert_close(got, twin(**batch, expert="a").logits, rtol=0, atol=1e-5)


def test_no_task_type_where_peft_would_then_not_adapt_the_module(build: Any) -> None:
    model = build("BertForSequenceClassification")
    found = TransformersArchitecture(model.config, type(model))
    low = {"classifier.weight": factors(2, 16, 2, 0), "pooler.dense.weight": factors(16, 16, 2, 1)}
    assert task_of(found) == "SEQ_CLS" and task_of(TransformersArchitecture(model.config, type(model.bert))) is None
    assert adapter_config(found, carried(found, low), [], "b")["task_type"] is None
    del low["classifier.weight"]
    assert adapter_config(found, carried(found, low), [], "b")["task_type"] == "SEQ_CLS"
