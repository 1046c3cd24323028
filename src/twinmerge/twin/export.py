"""Ways out of a twin: dense weights of one mixture, and LoRA adapters that PEFT and vLLM load on the shared model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from twinmerge.arguments import shown, strict
from twinmerge.engine.card import cell, fenced
from twinmerge.engine.folder import Beside, write_about
from twinmerge.engine.front import front_matter, front_of, licence_said, made_of
from twinmerge.engine.usage import adapter_usage
from twinmerge.errors import DataError, UsageError
from twinmerge.maths.lowrank import Factors
from twinmerge.models.adapter import PREFIX
from twinmerge.models.adapter_files import (
    KINDS,
    MATRICES,
    adapter_config,
    carried,
    lora_tensors,
    said_of_tied,
    saved_modules,
    tied_weights,
    write_adapter,
)
from twinmerge.models.architecture import Architecture
from twinmerge.models.buffers import buffers_in, said_of
from twinmerge.models.conversion import stored_names
from twinmerge.models.head_files import HeadSpec
from twinmerge.models.transformers_class import TransformersArchitecture, class_of
from twinmerge.results import Written
from twinmerge.store.checkpoint import Spec
from twinmerge.store.checkpoint_writer import layout, write_checkpoint
from twinmerge.store.manifest import OUTPUT
from twinmerge.store.output import OutputFolder
from twinmerge.twin.about.card import written_out
from twinmerge.twin.mixing.mixture import index_of, mixture_weights
from twinmerge.twin.package import is_twin, shared_folder

if TYPE_CHECKING:
    from twinmerge.twin.core import Core

Server = Literal["peft", "vllm"]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.14 takes as `max_lora_rank`."""


class _Exported(NamedTuple):
    folder: Path
    rank: int | None
    left_out: dict[str, float]
    tied: list[str]


class Exported(Written, _Exported):
    """What was exported; a path itself, for whoever opens it.

    Attributes:
        folder: that was written.
        rank: the largest of an adapter; None of a model.
        left_out: parameter -> its share of the squared norm of all that the mixture adds to the shared model, for
            what an adapter cannot carry.
        tied: what several modules share, of `left_out`: PEFT would add a change once for each of them when it merges.
    """

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `twinmerge twin export --json` prints."""
        found = super().to_dict()
        return {"output": found.pop("folder"), **({} if self.rank is None else found)}

    def _summary(self) -> str:
        return f"{'model' if self.rank is None else f'adapter of rank {self.rank}'}, in {self.folder}"


def export(
    twin: Core,
    mixture: str | Mapping[str, float],
    out: str | Path,
    *,
    lora: bool = False,
    server: Server = "peft",
    base: str | None = None,
    head: str | None = None,
) -> Exported:
    """See `Twin.export`."""
    if lora:
        return export_lora(twin, mixture, out, server=server, base=base, head=head)
    if server != "peft" or base is not None:
        raise UsageError("Only adapters are for a server and name a base. Ask for lora, or leave both out.")
    if isinstance(mixture, str):
        head = head or (mixture if mixture in twin.package.heads else None)
        mixture = {mixture: 1.0}
    return Exported(export_dense(twin, mixture, out, head), None, {}, [])


@strict
def export_dense(twin: Core, mixture: Mapping[str, float], out: str | Path, head: str | None = None) -> Path:
    """Write θs + Σ wt vt for one fixed mixture; stock transformers loads it.

    Args:
        mixture: expert -> weight.
        out: a folder that does not exist or is empty.
        head: the expert whose output layers go with it, in its class; without one, the bare model of twins with
            heads.

    Raises:
        TwinmergeError: unknown names, weights that are not finite, an output that is there.
    """
    _require_twin(twin)
    state = twin.weights_for(mixture)
    architecture, own = _class_with_head(twin, head)
    state |= own.tensors if own else {}
    aliases, tensors = architecture.aliases, dict[str, Tensor]()
    for key, name in stored_names(architecture).items():
        if name in state:
            tensors[key] = state[name].contiguous()
        elif aliases.get(name) not in state:
            more = " Say whose output layers go with it (head)." if twin.package.heads and head is None else ""
            raise DataError(f"The twin has no tensor {name!r} of {architecture.model_class.__name__}.{more}")
    files = layout({key: Spec(t.dtype, tuple(t.shape)) for key, t in tensors.items()})
    output = OutputFolder(out, sum(spec.bytes for specs in files.values() for spec in specs.values()))
    with output as folder:
        output.sums[OUTPUT] = write_checkpoint(
            folder, files, ((key, tensors[key]) for specs in files.values() for key in specs)
        )
        described = {"export": {"mixture": dict(mixture), "head": head}, "from": twin.package.provenance}
        weights = "".join(f"- `{cell(name)}`: {weight:g}\n" for name, weight in mixture.items())
        text = f"The weights of one mixture of a twin's experts, θs + Σ wt vt:\n\n{weights}"
        if buffers := buffers_in(twin.package.provenance):
            text += f"\n{said_of(buffers)}\n"
        title = f"One mixture of {', '.join(mixture)}" if mixture else "The shared part of a twin"
        card = written_out(title, text, twin.package.provenance, twin.package.home)
        Beside(twin.package.shared, twin.side_files, described, card, architecture=architecture).write(folder)
    return Path(out)


@strict
def export_lora(
    twin: Core,
    mixture: str | Mapping[str, float],
    out: str | Path,
    *,
    server: Server = "peft",
    base: str | None = None,
    head: str | None = None,
) -> Exported:
    """Write an expert, or a fixed mixture, as a LoRA adapter of the shared model: Σ wt Bt At, exact, side by side.

    Matrices of Linear, Conv1D, Conv2d and embeddings travel as factors with a scaling of 1, an expert's head as
    `modules_to_save`. What LoRA cannot carry (norms, biases, tied tables, positions of another kind) is listed with its
    share. Of a twin with heads, an adapter without one is of the bare model, which gives hidden states.

    Args:
        mixture: an expert's name, or expert -> weight; the ranks of several add up, nothing is approximated.
        out: a folder that does not exist or is empty.
        server: "vllm" leaves out embeddings and heads, which vLLM refuses, and pads to a rank that it takes; what
            changes the experts of a mixture-of-experts model is refused, since vLLM reads their factors in layouts
            that differ by model.
        base: what the adapter names as its base model; where None, the folder `shared` of the twin that was read or
            saved, which stock transformers loads.
        head: the expert whose output layers go with it; that of an expert alone where None, and none with vLLM.

    Raises:
        TwinmergeError: unknown names, experts that are masks, a rank beyond 512 or a head for vLLM, nothing that an
            adapter could carry, no base named by a twin without a folder.

    Source: Hu et al. 2021, "LoRA", arXiv 2106.09685; PEFT's file layout; vLLM's documentation for its limits.
    """
    _require_twin(twin)
    weights = {mixture: 1.0} if isinstance(mixture, str) else dict(mixture)
    row = dict(zip(twin.experts, mixture_weights(weights, twin.experts, 1)[0].tolist(), strict=True))
    used = {name: w for name, w in row.items() if w}
    if any(twin.package.exclusive[e].masked for e in used):
        raise UsageError(
            f"{', '.join(used)}: masks of one vector are no low-rank factors, so no LoRA adapter holds them. Export "
            "dense weights."
        )
    low = {n: _joined(twin, used, n) for n in dict.fromkeys(n for e in used for n in twin.package.exclusive[e].low)}
    if server == "vllm" and head is not None:
        raise UsageError("vLLM takes no output layers in an adapter. Leave head out, or export for PEFT.")
    if head is None and server == "peft" and isinstance(mixture, str) and mixture in twin.package.heads:
        head = mixture
    architecture, own = _class_with_head(twin, head)
    modules = carried(architecture, low, MATRICES if server == "vllm" else KINDS)
    if server == "vllm":
        _refuse_experts(twin, used)
    if not modules:
        raise UsageError(f"Nothing that {_who(used, 'add')} fits into an adapter. Export dense weights.")
    base = base or _home(twin)
    rank = max(one.factors.rank for one in modules.values())
    if server == "vllm":
        if rank > VLLM_RANKS[-1]:
            raise UsageError(
                f"The adapter has rank {rank}, vLLM takes {VLLM_RANKS[-1]} at most. Mix fewer experts, or compress the "
                "twin first."
            )
        rank = next(r for r in VLLM_RANKS if r >= rank)
        modules = {path: one._replace(factors=_padded(one.factors, rank)) for path, one in modules.items()}
    tensors = lora_tensors(modules)
    saved: dict[str, list[str]] = {}
    if own is not None:
        saved = saved_modules(architecture, own.tensors)
        for key in (key for keys in saved.values() for key in keys):
            if (name := architecture.of_module(key)) in own.tensors:
                tensors[f"{PREFIX}{key}"] = own.tensors[name]
    tensors = {n: t.contiguous() for n, t in tensors.items()}
    config = adapter_config(architecture, modules, list(saved), base)
    output = OutputFolder(out, sum(t.numel() * t.element_size() for t in tensors.values()))
    with output as folder:
        output.sums[OUTPUT] = write_adapter(folder, tensors, config)
        left = _left_out(twin, used, low, {one.name for one in modules.values()})
        tied = sorted(left.keys() & tied_weights(architecture))
        described = {"export": {"mixture": used, "head": head, "left_out": left}, "from": twin.package.provenance}
        write_about(folder, described, _card(twin, used, base, left, tied, architecture, head))
    return Exported(Path(out), rank, left, tied)


# ------------------------------------------------------------------------------------------------ inside


def _require_twin(twin: Any) -> None:
    if not hasattr(twin, "weights_for"):
        raise UsageError(f"A twin is exported, not {shown(twin)}. Open a folder with Twin.from_pretrained.")


def _who(used: Mapping[str, float], does: str) -> str:
    """
    Example:
        >>> _who({"a": 1.0}, "add"), _who({"a": 0.5, "b": 0.5}, "add"), _who({}, "add")
        ('a adds', 'a, b add', 'no expert adds')
    """
    return f"{', '.join(used) or 'no expert'} {does}{'' if len(used) > 1 else 's'}"


def _home(twin: Core) -> str:
    """Where stock transformers finds the shared model."""
    home = twin.package.home
    if home is None or not is_twin(home):
        gone = "was never saved" if home is None else f"is no longer at {home}"
        raise UsageError(
            f"An adapter names the model that it is of, and this twin {gone}. Save it first (save_pretrained), or name "
            "where its shared model will be (base)."
        )
    return str(shared_folder(home))


def _class_with_head(twin: Core, head: str | None) -> tuple[Architecture, HeadSpec | None]:
    """The class that runs a head and its tensors; without one that of the shared model, the bare one where there are
    heads: the class of a head would answer with layers of random numbers."""
    if head is None:
        found = twin.package.shared.architecture
        assert found is not None  # a twin without a class cannot be put together
        if twin.package.heads and found.config is not None and not found.is_bare:
            found = TransformersArchitecture(found.config, class_of(found.config, "FEATURE_EXTRACTION"))
        return found, None
    if head not in twin.package.heads:
        index_of(head, list(twin.package.heads))
    spec = twin.package.heads[head]
    return TransformersArchitecture(spec.config, class_of(spec.config)), spec


def _refuse_experts(twin: Core, used: Mapping[str, float]) -> None:
    found = twin.package.shared.architecture
    stored = twin.package.shared.stored
    for name in dict.fromkeys(n for e in used for n in twin.package.exclusive[e].names):
        shape = found.parameters.get(name, ()) if found else ()
        if found and (found.fused_into(stored.get(name, name)) or (len(shape) == 3 and "expert" in name)):
            raise UsageError(
                f"{_who(used, 'change')} the experts' matrices ({name!r}), whose factors vLLM reads in layouts that "
                "differ from model to model. "
                "Export dense weights (without --lora), or --server peft, which leaves the experts out and says so."
            )


def _joined(twin: Core, used: Mapping[str, float], name: str) -> Factors:
    parts = [(w, twin.package.exclusive[e].low[name]) for e, w in used.items() if name in twin.package.exclusive[e].low]
    return Factors(torch.cat([w * f.b for w, f in parts], 1), torch.cat([f.a for _, f in parts]))


def _padded(f: Factors, rank: int) -> Factors:
    more = rank - f.rank
    return Factors(nn.functional.pad(f.b, (0, more)), nn.functional.pad(f.a, (0, 0, 0, more)))


def _left_out(twin: Core, used: Mapping[str, float], low: Mapping[str, Factors], carried: set[str]) -> dict[str, float]:
    dense: dict[str, Tensor] = {}
    for expert, weight in used.items():
        for name, tensor in twin.package.exclusive[expert].dense.items():
            dense[name] = dense.get(name, torch.zeros_like(tensor)) + weight * tensor
    energy = {name: float(tensor.double().square().sum()) for name, tensor in dense.items()}
    energy |= {name: factors.energy() for name, factors in low.items()}
    total = sum(energy.values()) or 1.0
    lost = {name: of / total for name, of in energy.items() if name not in carried and of}
    return dict(sorted(lost.items(), key=lambda item: -item[1]))


def _card(
    twin: Core,
    used: Mapping[str, float],
    base: str,
    left: Mapping[str, float],
    tied: list[str],
    architecture: Architecture,
    head: str | None,
) -> str:
    rows = "".join(f"| `{name}` | {100 * share:.3g} % |\n" for name, share in left.items())
    lost = (
        "An adapter cannot carry these; they stay the shared model's:\n\n| parameter | share |\n| --- | ---: "
        f"|\n{rows}\n"
    ) + (f"{said_of_tied(tied)}\n\n" if tied else "")
    mixed = ", ".join(f"{weight:g} {name}" for name, weight in used.items())
    front = {"library_name": "peft", **made_of([base], "adapter"), "tags": ["twinmerge", "lora"]}
    front |= licence_said(front_of(twin.package.home))
    heads, shared = twin.package.heads, twin.package.shared.specs
    buffers = buffers_in(twin.package.provenance)
    tensors = heads[head].tensors if head is not None else {}
    other = any(name in shared and shared[name].shape != tuple(t.shape) for name, t in tensors.items())
    labels = len(architecture.labels or []) if tensors else 0
    use = fenced("python", adapter_usage(architecture.model_class.__name__, labels, other))
    return (
        f"{front_matter(front)}# LoRA adapter of a twin's shared model: {mixed}\n\n{lost if left else ''}"
        f"{_said_of_heads(heads, head)}{f'{said_of(buffers)}{chr(10) * 2}' if buffers else ''}"
        f"The base is `{base}`: the shared model of the twin, and no other.\n\n## Use\n\n{use}"
    )


def _said_of_heads(heads: Mapping[str, HeadSpec], head: str | None) -> str:
    """Which output layers an adapter has, and which it lacks; nothing of a twin without heads."""
    lacking = ", ".join(f"`{cell(name)}`" for name in heads if name != head)
    names = ", ".join(f"`{name}`" for name in sorted({n for spec in heads.values() for n in spec.tensors}))
    if head is not None:
        labels = ", ".join(map(cell, heads[head].labels))
        found = f"The output layers ({names}) are those of `{cell(head)}`" + (
            f", with the labels {labels}" if labels else ""
        )
        return f"{found}.{f' Not those of {lacking}.' if lacking else ''}\n\n"
    if not heads:
        return ""
    return (
        f"It has no output layers ({names}), neither those of {lacking} nor others: it is of the bare model, which "
        "gives hidden states. The twin exports an adapter with one expert's (`head`, PEFT alone), or a whole model.\n\n"
    )
