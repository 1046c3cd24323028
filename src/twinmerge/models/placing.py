"""An adapter put on its base: which tensor it changes, in which way its module stores it, and what PEFT takes from it
first.

Longer than other files: one class walks through all kinds of tensors that an adapter may hold, and each kind is a
method of a few lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from twinmerge.errors import ModelError, TwinmergeError, nearest
from twinmerge.maths.lowrank import Factors, in_full
from twinmerge.models.adapter import Adapter, Pair, unwrapped
from twinmerge.models.adapter_config import CONVERT
from twinmerge.models.architecture import Architecture
from twinmerge.models.change import Change, Rows, Stack
from twinmerge.models.fused import Part, fused_parts, in_another_form, stack_of
from twinmerge.models.tied import alone, tied
from twinmerge.models.transformers_class import TASK_CLASSES, TransformersArchitecture, class_of
from twinmerge.store.checkpoint import Spec

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ATTENTION_OUTPUT = ".base_layer.out_proj"  # of nn.MultiheadAttention, whose wrapper adapts both projections
STARTS = (torch.float32, torch.float16, torch.bfloat16)


class Base(NamedTuple):
    """The model that an adapter is put on. All names are canonical.

    stored: canonical -> name in its files; read: a stored tensor by its canonical name.
    """

    name: str
    architecture: Architecture | None
    specs: Mapping[str, Spec]
    stored: Mapping[str, str]
    aliases: Mapping[str, str]
    read: Callable[[str], Tensor]


def class_for(adapter: Adapter, architecture: Architecture | None) -> Architecture | None:
    """The base's class, or that of the adapter's task where the base has not what the adapter changes."""
    named = _named_class(adapter, architecture)
    if architecture is None or (adapter.task not in TASK_CLASSES and named is None):
        return architecture
    own = {path for path, _ in architecture.skeleton.named_modules()}
    known = architecture.parameters
    names = [f"{unwrapped(module)}.weight" for module in adapter.pairs] + list(adapter.dense)
    fits = all(name.rpartition(".")[0] in own or architecture.canonical(name) in known for name in names)
    if fits and not architecture.is_bare and adapter.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"):
        return architecture
    if fits and named is not None:
        return architecture
    config = architecture.config
    try:
        task_class = named or class_of(config, adapter.task)
    except TwinmergeError:
        if fits:
            return architecture
        raise
    if task_class is architecture.model_class:
        return architecture
    changed: PretrainedConfig = type(config).from_dict(config.to_dict())
    outputs = {n: t.shape[0] for n, t in adapter.dense.items() if n.endswith("weight") and t.dim() == 2}
    heads = [n for n in outputs if {"classifier", "score"} & set(n.split("."))]
    if outputs and (adapter.task in ("SEQ_CLS", "TOKEN_CLS") or (named is not None and heads)):
        changed.num_labels = outputs[(heads or list(outputs))[-1]]
    return TransformersArchitecture(changed, task_class)


def _named_class(adapter: Adapter, architecture: Architecture | None) -> type[PreTrainedModel] | None:
    """The class that PEFT noted of an adapter without a task, where it is one of transformers for the base's config."""
    name = adapter.config.model_class
    found = None if adapter.task is not None or name is None else getattr(transformers, name, None)
    if architecture is None or not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        return None
    return found if found.config_class is type(architecture.config) else None


def placed(adapter: Adapter, base: Base) -> dict[str, Change]:
    """Canonical name -> what the adapter makes of the base's tensor: what PEFT computes when it loads it.

    Raises:
        TwinmergeError: a tensor that the base has not, or has in another shape; ranks that are not the config's; one
            of two tied tensors changed; a kind of module whose factors are no sum on its weight.
    """
    return _Placing(adapter, base).changes()


class _Placing:
    def __init__(self, adapter: Adapter, base: Base) -> None:
        self.adapter, self.base, self.config = adapter, base, adapter.config
        self.architecture = base.architecture
        self.modules = dict(self.architecture.skeleton.named_modules()) if self.architecture else {}

    @cached_property
    def in_class(self) -> dict[str, str]:
        """Canonical name -> name in the class."""
        found = self.architecture
        return {found.of_module(name): name for name in found.skeleton.state_dict()} if found else {}

    @cached_property
    def fused(self) -> dict[str, list[Part]]:
        """Parameter of the class -> the stored tensors that it is put together from."""
        if self.architecture is None:
            return {}
        return fused_parts(self.architecture, {name: self.base.stored[name] for name in self.base.specs})

    @cached_property
    def other_forms(self) -> set[str]:
        """Parameters of the class that the files hold in another form."""
        return in_another_form(self.architecture, self.base.stored.values()) if self.architecture else set()

    def _other_form(self, name: str) -> ModelError:
        return ModelError(
            f"The adapter {self.adapter.name} changes {name!r}, which the files of the base {self.base.name} hold in "
            "another form. Merge "
            "the adapter into it first (merge_and_unload, save_pretrained) and give the full model."
        )

    @cached_property
    def fused_several(self) -> set[str]:
        """Stored tensors that lie beside others in an expert's matrix."""
        several = [parts for parts in self.fused.values() if len({part.start for part in parts}) > 1]
        return {part.name for parts in several for part in parts}

    def canonical(self, name: str) -> str:
        """Of a parameter as the adapter names it, which may be as older versions of transformers did."""
        if self.architecture is None:
            return name
        own = self.architecture.of_module(name)
        if own in self.in_class or own in self.base.specs:
            return own
        renamed = self.architecture.canonical(name)
        return renamed if renamed in self.in_class or renamed in self.base.specs else own

    def path(self, canonical: str) -> str:
        """The module's path in the class."""
        return self.in_class.get(canonical, canonical).rpartition(".")[0]

    # ------------------------------------------------------------------------------------------------ all of it

    def changes(self) -> dict[str, Change]:
        found: dict[str, Change] = {}
        for module, pair in self.adapter.pairs.items():
            for name, change in self._of_pair(module, pair):
                if name in found:
                    raise ModelError(f"The adapter {self.adapter.name} changes {name!r} twice. Save it again.")
                found[name] = change
        for name, tensor in self.adapter.dense.items():
            own = self.canonical(name)
            change = found.get(own, Change())
            if self._is_copy(name, own, tensor):
                continue
            self._known(name, own, tensor)
            found[own] = change._replace(dense=tensor, taken=None)
        for module, rows in self.adapter.rows.items():
            name, change = self._of_rows(module, rows)
            if name in found:
                raise ModelError(
                    f"The adapter {self.adapter.name} changes {name!r} in two ways, by rows or under two names. Untie "
                    "the base (tie_word_embeddings=False), or merge the adapter into it first (merge_and_unload)."
                )
            found[name] = change
        return tied(found, self.base.specs, self.base.aliases, self.adapter.name, self.base.name, self._values())

    def _values(self) -> set[str]:
        """Canonical names of what PEFT loads into the base's own parameters, and so into all that share it: modules
        that are trained in full or have factors are copies of their own."""
        saved, adapted = self.config.saved, {unwrapped(module) for module in self.adapter.pairs}
        return {
            self.canonical(name)
            for name in self.adapter.dense
            if not any(f".{module}." in f".{name}" for module in saved) and name.rpartition(".")[0] not in adapted
        }

    def _is_copy(self, name: str, own: str, tensor: Tensor) -> bool:
        """PEFT saves the base's embeddings beside their factors, and both of two tied tensors."""
        aliases = self.base.aliases
        if name not in self.adapter.copies and own not in aliases and own not in aliases.values():
            return False
        stored = aliases.get(own, own)
        spec = self.base.specs.get(own, self.base.specs.get(stored))
        if spec is None or spec.shape != tuple(tensor.shape):
            return False
        base = self.base.read(own if own in self.base.specs else stored)
        return torch.equal(tensor.to(base.dtype), base)

    def _known(self, name: str, own: str, tensor: Tensor | None = None) -> None:
        spec = self.base.specs.get(own)
        body = self.architecture is not None and self.architecture.is_body(own)
        if (
            tensor is not None
            and spec is not None
            and spec.shape != tuple(tensor.shape)
            and (body or name in self.adapter.copies)
        ):
            raise ModelError(
                f"The adapter {self.adapter.name} holds {own!r} as {list(tensor.shape)}, in its base {self.base.name} "
                f"it is {list(spec.shape)}. Name the base that the adapter was trained on (resize_token_embeddings and "
                "save it, if its vocabulary grew)."
            )
        if own not in self.base.specs and own in self.other_forms:
            raise self._other_form(own)
        if own in self.base.specs or own in self.in_class or own in self.base.aliases:
            return
        listed = any(f".{module}." in f".{name}" for module in self.config.saved)
        if self.architecture is None and listed:
            return  # a head of a bare checkpoint
        kind = f" ({self.architecture.model_class.__name__})" if self.architecture else ""
        raise ModelError(
            f"The adapter {self.adapter.name} holds {self.adapter.written.get(name, name)!r}, which its base {self.base.name}{kind} does not "
            f"have.{nearest(own, self.base.specs)} "
            "Name the base that the adapter was trained on, or save the adapter with its task_type."
        )

    # ------------------------------------------------------------------------------------------------ factors

    def _of_pair(self, module: str, pair: Pair) -> Iterator[tuple[str, Change]]:
        depth, plain = module.count(".base_layer"), unwrapped(module)
        doubled = module.endswith(ATTENTION_OUTPUT)
        if (parameter := self._parameter(plain, depth)) is not None:
            yield from self._of_parameter(plain, parameter, pair)
            return
        name = self.canonical(f"{plain}.weight")
        if name not in self.base.specs and name not in self.base.aliases:
            attention = self.canonical(f"{plain}.in_proj_weight")
            name = attention if attention in self.base.specs else name
        if self.config.rslora and name in self.fused_several:
            raise ModelError(
                f"The adapter {self.adapter.name} scales {name!r} by alpha / √r (use_rslora), which PEFT reads as "
                "another number since transformers 5 put such matrices together. Merge it into its base first, with "
                "the versions that trained it."
            )
        whose = module.removesuffix(ATTENTION_OUTPUT) if doubled else plain
        if not any(
            self.config.targeted(path) for path in (whose, self.path(name).removesuffix(".out_proj"), self.path(name))
        ):
            raise ModelError(
                f"The adapter {self.adapter.name} has factors of {whose!r}, which its target_modules do not name, and "
                "PEFT leaves such out. Take the adapter_config.json that was saved with it."
            )
        scaling = self._scaling(whose, self.path(name).removesuffix(".out_proj" if doubled else ""), pair.a.shape[0])
        if doubled:
            scaling *= 2  # PEFT adds it twice, in training as in merging
        factors = self._oriented(plain, name, pair, scaling)
        self._fits(name, factors)
        yield name, Change(taken=self._taken(name, pair, scaling), added=factors)
        if pair.bias is not None:
            bias = self.canonical(f"{plain}.bias")
            added = Factors((in_full(pair.bias) * scaling)[:, None], torch.ones(1, 1))
            self._fits(bias, added)
            yield bias, Change(added=added)

    def _scaling(self, written: str, path: str, rank: int) -> float:
        """By PEFT's rule on the module's path in the class; by the adapter's own where only that has the tensors'
        rank."""
        config = self.config
        if written in config.scalings:
            return config.scalings[written]
        ours, theirs = config.rank_of(path), config.rank_of(written)
        if rank not in (ours, theirs):
            raise ModelError(
                f"The adapter {self.adapter.name} has factors of rank {rank} for {written!r}, by its "
                f"adapter_config.json it is {ours} (r, rank_pattern). Take the adapter_config.json that was saved with "
                "it."
            )
        if ours == theirs and config.scaling(path) != config.scaling(written):
            raise ModelError(
                f"The alpha_pattern of the adapter {self.adapter.name} gives {written!r} another alpha than {path!r}, "
                "as transformers calls it now. Save the adapter again with these versions."
            )
        return config.scaling(path if rank == ours else written)

    def _oriented(self, plain: str, name: str, pair: Pair, scaling: float) -> Factors:
        """As the module stores its weight: PEFT saves one `fan_in_fan_out`, whatever kinds are adapted."""
        module = self.modules.get(self.path(name)) if name in self.in_class else None
        if isinstance(module, CONVOLUTIONS):
            odd = "groups" if module.groups > 1 else "padding_mode" if module.padding_mode != "zeros" else None
            odd = "dilation" if any(d != 1 for d in module.dilation) else odd
            if odd:
                raise ModelError(
                    f"The adapter {self.adapter.name} changes the convolution {plain!r}, whose {odd} PEFT's factors do "
                    "not have, so that they are no sum on its weight. Leave this module out of target_modules."
                )
        transposed = (
            isinstance(module, Conv1D) if isinstance(module, (nn.Linear, Conv1D)) else self.config.fan_in_fan_out
        )
        transposed = transposed and pair.a.dim() == 2 and not isinstance(module, nn.MultiheadAttention)
        return pair.factors(scaling, transposed)

    def _taken(self, name: str, pair: Pair, scaling: float) -> Factors | None:
        """The part of the base's weight that PiSSA and OLoRA start from, and that PEFT takes out of it on loading."""
        start = self.config.start
        if start is None or pair.embedding:  # PEFT starts tables as usual
            return None
        weight = self.base.read(self.base.aliases.get(name, name))
        transposed = self.architecture is not None and name in self.architecture.transposed
        if pair.bias is not None or weight.dim() != 2 or weight.dtype not in STARTS or scaling <= 0:
            raise ModelError(
                f"The adapter {self.adapter.name} starts {name!r} by {start} (init_lora_weights), which PEFT does for "
                "matrices of 16 or 32 "
                f"bits alone. {CONVERT}"
            )
        if not bool(weight.isfinite().all()):
            raise ModelError(
                f"Tensor {name!r} of the base {self.base.name} holds NaN or infinity. Take a sound checkpoint of it."
            )
        rank, weight = pair.a.shape[0], weight.float()
        if start == "olora":  # of the weight as it is stored, even for Conv1D
            q, r = torch.linalg.qr(weight)
            return Factors(scaling * q[:, :rank], r[:rank].contiguous())
        u, s, vh = torch.linalg.svd(weight.T if transposed else weight, full_matrices=False)
        b, a = u[:, :rank] * s[:rank], vh[:rank]
        return Factors(a.T.contiguous(), b.T.contiguous()) if transposed else Factors(b, a.contiguous())

    def _fits(self, name: str, factors: Factors | Stack) -> None:
        specs, aliases = self.base.specs, self.base.aliases
        if name not in specs and name not in aliases and name in self.in_class:
            raise self._other_form(name)
        if name not in specs and name not in aliases:
            raise ModelError(
                f"The adapter {self.adapter.name} changes {name!r}, which its base {self.base.name} does not have."
                f"{nearest(name, specs)} Name the base that the adapter was trained on."
            )
        shape = specs[name if name in specs else aliases[name]].shape
        own = tuple(factors.shape)
        if own != shape and own != (shape[0] if shape else 1, math.prod(shape[1:])):
            raise ModelError(
                f"The adapter {self.adapter.name} changes {name!r} as {list(own)}, in its base {self.base.name} it is "
                f"{list(shape)}. Name the base that the adapter was trained on."
            )

    # ------------------------------------------------------------------------------------------------ parameters

    def _parameter(self, plain: str, depth: int) -> str | None:
        """The parameter that a pair of `target_parameters` is of: wrappers of one module lie in each other, its first
        innermost."""
        targets = self.config.parameters
        if not targets:
            return None
        last = "weight"
        container = self.canonical(f"{plain}.{last}").rpartition(".")[0]
        paths = (
            [p for p in self.modules if p and container in (p, self.architecture.of_module(p))]
            if self.architecture
            else []
        )
        path = paths[0] if paths else plain
        module = self.modules.get(path)
        if module is None:
            here = sorted({t.rpartition(".")[2] for t in targets if _ends(plain, t.rpartition(".")[0])})
            if not here:
                return None
            if len(here) > 1:
                raise ModelError(
                    f"The adapter {self.adapter.name} has factors of {', '.join(here)} of {plain!r}, and without the "
                    "base's config.json their order is not known. Add its config.json."
                )
            return here[0]
        own: list[str] = [
            n for n, _ in module.named_parameters(recurse=False) if any(_ends(f"{path}.{n}", t) for t in targets)
        ]
        if not own:
            return None
        if depth >= len(own):
            raise ModelError(
                f"The adapter {self.adapter.name} wraps {plain!r} {depth + 1} times, but its target_parameters name "
                f"{len(own)} of its "
                "parameters. Take the adapter_config.json that was saved with it."
            )
        return own[len(own) - 1 - depth]

    def _of_parameter(self, plain: str, parameter: str, pair: Pair) -> Iterator[tuple[str, Change]]:
        name = self.canonical(f"{plain}.{parameter}")
        path = self.in_class.get(name, f"{plain}.{parameter}")
        parts = self.fused.get(name) if name not in self.base.specs else None
        if parts is None:
            shape = self.base.specs[name].shape if name in self.base.specs else None
        else:
            shape = tuple(self.architecture.parameters[name]) if self.architecture else None
        if shape is None:
            self._fits(name, Factors(pair.b, pair.a))  # which names what is missing
            return
        if self.config.start or pair.bias is not None or pair.embedding:
            raise ModelError(
                f"The adapter {self.adapter.name} changes the parameter {name!r} in a way that PEFT does not know "
                "(init_lora_weights, "
                f"lora_bias). {CONVERT}"
            )
        experts = shape[0] if len(shape) == 3 else 1
        if pair.a.shape[0] % experts:
            self._fits(name, Factors(pair.b, pair.a))
        scaling = self._scaling(f"{plain}.{parameter}", path, pair.a.shape[0] // experts)
        if len(shape) != 3:
            factors = Factors(in_full(pair.b) * scaling, in_full(pair.a))
            self._fits(name, factors)
            yield name, Change(added=factors)
            return
        module = self.modules.get(path.rpartition(".")[0])
        stack = stack_of(
            pair.a, pair.b, scaling, name, tuple(shape), self.config, bool(getattr(module, "is_transposed", False))
        )
        if parts is None:
            self._fits(name, stack)
            yield name, Change(added=stack)
            return
        for part in parts:
            whole = stack.of[part.expert]
            factors = Factors(whole.b[part.start : part.stop], whole.a)
            self._fits(part.name, factors)
            yield part.name, Change(added=factors)

    # ------------------------------------------------------------------------------------------------ rows

    def _of_rows(self, module: str, rows: Tensor) -> tuple[str, Change]:
        name = self.canonical(f"{module}.weight")
        self._known(f"{module}.weight", name)
        if (
            name in self.base.aliases and self.base.aliases[name] in self.base.specs
        ):  # of the embeddings, PEFT ties them
            raise alone(self.adapter.name, self.base.name, name, self.base.aliases[name])
        tokens = self.config.tokens
        named = [at for of, at in tokens.items() if of is not None and _ends(module, of)]
        at = named[0] if named else tokens.get(None)
        shape = self.base.specs[name].shape if name in self.base.specs else ()
        if at is None or len(at) != len(rows) or rows.shape[1:] != shape[1:] or max(at, default=0) >= shape[0]:
            raise ModelError(
                f"The adapter {self.adapter.name} has {list(rows.shape)} numbers for rows of {name!r}, which do not "
                f"fit its trainable_token_indices and the base's {list(shape)}. Name the base that the adapter was "
                "trained on."
            )
        return name, Change(rows=Rows(torch.tensor(at, dtype=torch.long), rows))


def _ends(name: str, end: str) -> bool:
    return bool(end) and (name == end or name.endswith(f".{end}"))
