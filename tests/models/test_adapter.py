"""ΔW of LoRA layers against PEFT's own merge, and refusals."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from twinmerge.errors import TwinmergeError
from twinmerge.models.adapter import adapter_from, read_adapter

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.block = nn.ModuleDict({"first": nn.Linear(6, 3), "last": nn.Linear(3, 3)})
        self.table = nn.Embedding(5, 4)
        self.image = nn.Conv2d(3, 4, (2, 3))
        self.turned = Conv1D(6, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["first", "last"]},
        {"target_modules": ["first", "last"], "use_rslora": True},
        {
            "target_modules": ["first", "last"],
            "rank_pattern": {"block.first": 3},
            "alpha_pattern": {"block.first": 7, "l.st": 9},
        },
        {"target_modules": ["table"]},
        {"target_modules": ["image"]},
        {"target_modules": ["turned"], "fan_in_fan_out": True},
        {"target_modules": ["first"], "modules_to_save": ["last"]},
        {"target_modules": ["first"], "bias": "lora_only"},
    ],
    ids=["linear", "rslora", "patterns", "embedding", "conv2d", "conv1d", "modules_to_save", "bias"],
)
def test_equals_merge_and_unload(tmp_path, options):
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, **options))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or (options.get("bias") and name.endswith("bias")):
            nn.init.normal_(parameter)
    original = {
        k.replace(".base_layer", "").replace(".original_module", ""): v.clone()
        for k, v in model.get_base_model().state_dict().items()
        if "lora_" not in k and "modules_to_save" not in k
    }
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    merged = model.merge_and_unload().state_dict()
    changed = {k for k, v in merged.items() if not torch.equal(v, original[k])} if not options.get("bias") else None
    assert changed is None or adapter.factors.keys() | adapter.dense.keys() == changed
    for name, want in merged.items():
        got = adapter.dense.get(name, original[name])
        if name in adapter.factors:
            got = got + adapter.factors[name].dense().reshape(got.shape)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    ranks = {name: factors.rank for name, factors in adapter.factors.items()}
    assert set(ranks.values()) == ({2, 3} if "rank_pattern" in options else {2})


def test_scaling_of_one_pair_by_hand():
    pair = {
        "base_model.model.x.lora_A.weight": torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]),
        "base_model.model.x.lora_B.weight": torch.tensor([[1.0, 0.0], [0.0, 10.0]]),
    }
    by_hand = torch.tensor([[1.0, 2.0, 3.0], [0.0, 10.0, 0.0]])  # B A
    adapter = adapter_from({**CONFIG, "task_type": "TaskType.SEQ_CLS"}, pair, "a")
    assert torch.equal(adapter.factors["x.weight"].dense(), 2 * by_hand) and adapter.task == "SEQ_CLS"
    root = adapter_from({**CONFIG, "use_rslora": True}, pair, "a").factors["x.weight"].dense()
    torch.testing.assert_close(root, 4 / 2**0.5 * by_hand)
    turned = adapter_from({**CONFIG, "fan_in_fan_out": True}, pair, "a").factors["x.weight"].dense()
    assert torch.equal(turned, 2 * by_hand.T)


@pytest.mark.parametrize(
    ("config", "tensors", "text"),
    [
        ({**CONFIG, "peft_type": "LOHA"}, {}, "is LOHA, only LoRA can be merged"),
        ({**CONFIG, "use_dora": True}, {}, "is DoRA"),
        (CONFIG, {"base_model.model.x.lora_magnitude_vector.weight": torch.ones(2)}, "is DoRA"),
        (CONFIG, {"base_model.model.x.lora_A.weight": torch.ones(2, 3)}, "only one of lora_A and lora_B for 'x'"),
        (CONFIG, {"base_model.model.x.lora_embedding_B": torch.ones(2, 3)}, "only one of lora_A and lora_B for 'x'"),
    ],
)
def test_what_cannot_be_merged_is_refused(config, tensors, text):
    with pytest.raises(TwinmergeError, match=text):
        adapter_from(config, tensors, "a")


def test_dora_of_peft_is_refused(tmp_path):
    peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["first"], use_dora=True)).save_pretrained(tmp_path)
    with pytest.raises(TwinmergeError, match="is DoRA.*merge_and_unload"):
        read_adapter(tmp_path)


def test_folder_without_its_files(tmp_path):
    with pytest.raises(TwinmergeError, match="adapter_config.json cannot be read"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(TwinmergeError, match="adapter_config.json cannot be read"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(TwinmergeError, match="no adapter_model.safetensors"):
        read_adapter(tmp_path)
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(TwinmergeError, match="only one of"):
        read_adapter(tmp_path)
