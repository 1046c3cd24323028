"""Tiny models of several families, experts of them, and mixtures rebuilt by plain arithmetic in stock transformers.

The reference never touches the runtime: θs comes from the static merge, vt = θt − θs from state dicts, truncation from
torch.linalg.svd, and every row runs alone, without padding, in the expert's own class.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    logging,
)

from twinmerge.engine.calls import merge
from twinmerge.models.change import Change
from twinmerge.models.opened import InMemory, OpenedModel
from twinmerge.store.checkpoint import Spec
from twinmerge.twin.twin import Twin

PAD, WORDS, ROWS, POSITIONS, EXPERTS = 1, 50, 5, 7, 3
SCALE = 0.29
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SIZES, "vocab_size": WORDS, "max_position_embeddings": 40, "pad_token_id": PAD}
VISION = {**SIZES, "image_size": 8, "patch_size": 4}
GPT2 = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": PAD}
LLAMA = {**TEXT, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 2}
T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": PAD}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Family:
    """base() and expert(number of labels) make models; prefix: of the base's names inside the expert's."""

    base: Callable[[], PreTrainedModel]
    expert: Callable[[int], PreTrainedModel]
    prefix: str = ""
    pixels: int = 0
    seq2seq: bool = False
    float32_inside: bool = False  # transformers computes a norm in float32 whatever the model's dtype


FAMILIES = {
    "bert": Family(
        lambda: BertModel(BertConfig(**TEXT)),
        lambda n: BertForSequenceClassification(BertConfig(num_labels=n, **TEXT)),
        "bert.",
    ),
    "roberta": Family(
        lambda: RobertaModel(RobertaConfig(type_vocab_size=1, **TEXT)),
        lambda n: RobertaForSequenceClassification(RobertaConfig(type_vocab_size=1, num_labels=n, **TEXT)),
        "roberta.",
    ),
    "vit": Family(
        lambda: ViTModel(ViTConfig(**VISION)),
        lambda n: ViTForImageClassification(ViTConfig(num_labels=n, **VISION)),
        "vit.",
        pixels=3,
    ),
    "clip_vision": Family(
        lambda: CLIPVisionModel(CLIPVisionConfig(projection_dim=16, **VISION)),
        lambda n: CLIPVisionModel(CLIPVisionConfig(projection_dim=16, **VISION)),
        pixels=3,
    ),
    "t5": Family(
        lambda: T5ForConditionalGeneration(T5Config(**T5)),
        lambda n: T5ForConditionalGeneration(T5Config(**T5)),
        seq2seq=True,
        float32_inside=True,
    ),
    "gpt2": Family(
        lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
        lambda n: GPT2LMHeadModel(GPT2Config(**GPT2)),
    ),
    "gpt2_classifier": Family(
        lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
        lambda n: GPT2ForSequenceClassification(GPT2Config(num_labels=n, **GPT2)),
    ),
    "llama": Family(
        lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
        lambda n: LlamaForCausalLM(LlamaConfig(**LLAMA)),
        float32_inside=True,
    ),
    "llama_tied": Family(
        lambda: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **LLAMA)),
        lambda n: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **LLAMA)),
        float32_inside=True,
    ),
    "mpnet": Family(lambda: MPNetModel(MPNetConfig(**TEXT)), lambda n: MPNetModel(MPNetConfig(**TEXT))),
}


@dataclass
class Case:
    """A base, its experts (labels 2, 3, ... where they have heads) and a batch with padding."""

    family: Family
    base: PreTrainedModel
    experts: dict[str, PreTrainedModel]
    batch: dict[str, Tensor]
    shared: dict[str, Tensor] = field(default_factory=dict)

    @property
    def heads(self) -> bool:
        return type(next(iter(self.experts.values()))) is not type(self.base)

    def twin(self, rank: int | None = None, **options: Any) -> Twin:
        options = {"shared": "task_arithmetic", "scale": SCALE} | options
        return Twin.build(self.base, self.experts, rank, progress=False, **options)

    def rebuilt(self, weights: Sequence[float], head: str, rank: int | None = None) -> PreTrainedModel:
        """The expert's own class with θs + Σ wt vt in place of every parameter that is not its head's."""
        model = copy.deepcopy(self.experts[head])
        states = [m.state_dict() for m in self.experts.values()]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                reference = self.shared.get(name, self.shared.get(name.removeprefix(self.family.prefix)))
                if reference is not None:
                    reference = reference.double()
                    deltas = [truncated(s[name].double() - reference, rank) for s in states]
                    total = sum((w * d for w, d in zip(weights, deltas, strict=True) if w), reference)
                    parameter.copy_(total)
        return model

    def alone(self, model: PreTrainedModel, row: int) -> Tensor:
        """What a stock model answers to one row without its padding."""
        one = {k: v[row : row + 1] for k, v in self.batch.items()}
        if "attention_mask" in one:
            length = int(one["attention_mask"].sum())
            one = {k: v if k.startswith("decoder") else v[:, :length] for k, v in one.items()}
        with torch.no_grad():
            return answer_of(model(**one))[0]

    def row_of(self, answer: Tensor, row: int, labels: int | None = None) -> Tensor:
        """A row of the twin's answer, without padding and without the labels of other heads."""
        found = answer[row]
        if self.heads:
            return found[: self.experts[self.names[labels or 0]].config.num_labels]
        if "attention_mask" in self.batch and not self.family.seq2seq:
            mask = self.batch["attention_mask"][row]
            return found[: len(found) - int((mask == 0).sum())]
        return found

    @property
    def names(self) -> list[str]:
        return list(self.experts)


def truncated(delta: Tensor, rank: int | None) -> Tensor:
    """The Eckart-Young cut of a matrix (a kernel as (out, rest)); what is no matrix stays."""
    if rank is None or delta.dim() < 2 or delta.shape[0] == 1 or delta[0].numel() == 1:
        return delta
    u, s, vh = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(delta.shape)


def answer_of(output: Any) -> Tensor:
    """Logits, or the last hidden states (the pooled state as a first position)."""
    if getattr(output, "logits", None) is not None:
        return output.logits
    if hasattr(output, "pooler_output") and output.pooler_output is not None:
        return torch.cat([output.pooler_output[:, None], output.last_hidden_state], 1)
    return output.last_hidden_state


def twin_answer(out: Any) -> Tensor:
    return out.logits if out.logits is not None else answer_of(out.output)


def nudged(model: PreTrainedModel, size: float, seed: int, only: Callable[[str], bool] = lambda n: True) -> Any:
    """A copy with noise on every parameter (that `only` takes)."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only(name):
                p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def tuned(base: PreTrainedModel, family: Family, labels: int, size: float, seed: int) -> PreTrainedModel:
    """An expert: the base's body with noise, and a head of its own."""
    expert = nudged(family.expert(labels).to(base.dtype), 0.1, 1000 + seed)
    moved = nudged(base, size, seed).state_dict()
    state = expert.state_dict()
    taken = {n: moved.get(n, moved.get(n.removeprefix(family.prefix), t)) for n, t in state.items()}
    taken = {n: t if t.shape == state[n].shape else state[n] for n, t in taken.items()}
    expert.load_state_dict(taken)
    return expert


def text_batch(rows: int = ROWS, positions: int = POSITIONS, seed: int = 0) -> dict[str, Tensor]:
    """Rows of several lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (rows, positions), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows, 2):
        mask[row, positions - 1 - row % (positions - 2) :] = 0
    return {"input_ids": torch.where(mask > 0, ids, PAD), "attention_mask": mask}


def make_case(name: str, dtype: torch.dtype = torch.float64, experts: int = EXPERTS, size: float = 0.03) -> Case:
    family = FAMILIES[name]
    torch.manual_seed(0)
    base = nudged(family.base(), 0.1, 99).to(dtype)
    found = {f"e{i}": tuned(base, family, 2 + i, size, i) for i in range(experts)}
    if family.pixels:
        pixels = torch.randn(ROWS, family.pixels, 8, 8, generator=torch.Generator().manual_seed(5))
        batch = {"pixel_values": pixels.to(dtype)}
    else:
        batch = text_batch()
        if family.seq2seq:
            batch["decoder_input_ids"] = batch["input_ids"][:, :4].contiguous()
    case = Case(family, base, found, batch)
    case.shared = merge("task_arithmetic", base=base, experts=found, progress=False, scale=SCALE).state_dict()
    return case


@lru_cache(maxsize=32)
def shared_case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    return make_case(name, dtype)


@lru_cache(maxsize=32)
def shared_twin(name: str, dtype: torch.dtype = torch.float64, rank: int | None = None) -> Twin:
    return shared_case(name, dtype).twin(rank)


def mixtures(kind: str, rows: int = ROWS, experts: int = EXPERTS) -> Tensor:
    """soft; one_hot; sparse (one expert or none at all); raw (any sign and sum, one row of zeros)."""
    generator = torch.Generator().manual_seed(7)
    soft = torch.softmax(torch.randn(rows, experts, generator=generator, dtype=torch.float64), -1)
    owner = torch.tensor([(2 * i + 2) % experts for i in range(rows)])
    hot = torch.nn.functional.one_hot(owner, experts).double()
    if kind == "soft":
        return soft
    if kind == "one_hot":
        return hot
    if kind == "sparse":
        hot[1] = 0
        hot[2] *= 0.6
        return hot
    if kind == "raw":
        raw = torch.randn(rows, experts, generator=generator, dtype=torch.float64)
        raw[-1] = 0
        return raw
    raise KeyError(kind)


def opened(tensors: Mapping[str, Tensor], factors: Mapping[str, Any] | None = None) -> OpenedModel:
    """A bare checkpoint in memory."""
    specs = {n: Spec(t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    changes = {n: Change(added=f) for n, f in (factors or {}).items()}
    return OpenedModel("m", specs, {n: n for n in tensors}, None, InMemory(dict(tensors)), changes=changes)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def own_family(make: Callable[[], nn.Module], size: float = 0.2) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A module of one's own that `make` makes, and three that were tuned from it."""
    torch.manual_seed(0)
    base, experts = make().eval(), {}
    for name in "abc":
        experts[name] = make().eval()
        experts[name].load_state_dict(base.state_dict())
        with torch.no_grad():
            for p in experts[name].parameters():
                p.add_(size * torch.randn_like(p))
    return base, experts


def own_twin(make: Callable[[], nn.Module], rank: int | None = 2) -> Twin:
    """A twin of such a family; it warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Twin.build(*own_family(make), rank, shared="task_arithmetic", progress=False)


def own_oracle(twin: Twin, make: Callable[[], nn.Module], mixture: dict[str, float], args: Any, named: Any) -> Any:
    """What torch itself says: a new module, the mixture's weights loaded, the whole batch."""
    module = make()
    module.load_state_dict({**module.state_dict(), **twin.weights_for(mixture)})
    args, named = copy.deepcopy((args, named))
    with torch.no_grad():
        return module.eval()(*args, **named)


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """The helpers of this folder; `case` and `twin` are shared between tests, which must not change them."""
    return SimpleNamespace(
        case=shared_case,
        twin=shared_twin,
        new_case=make_case,
        mixtures=mixtures,
        answer=twin_answer,
        stock_answer=answer_of,
        nudged=nudged,
        text_batch=text_batch,
        truncated=truncated,
        opened=opened,
        relative=relative,
        own_family=own_family,
        own_twin=own_twin,
        own_oracle=own_oracle,
        text=TEXT,
        vision=VISION,
        gpt2=GPT2,
        scale=SCALE,
    )
