"""Twins as classes of transformers: its auto classes and pipelines open a twin folder as the twin that it is.

`import twinmerge` registers them (`registration.py`); no code travels with a folder. Nothing of the library is
imported here before a twin is opened, since transformers imports this file with its auto classes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput

from twinmerge.twin import TYPE
from twinmerge.twin.auto.config import TwinConfig

if TYPE_CHECKING:
    from twinmerge.twin.twin import Twin

IGNORED = ("trust_remote_code", "low_cpu_mem_usage", "use_safetensors", "adapter_kwargs", "code_revision", "token")
"""Options of from_pretrained that mean nothing for a twin, or what it does anyway."""
FREE = ("dtype", "transformers_version", "_name_or_path")
"""Keys of a config that may differ from the folder's."""


@dataclass
class TwinModelOutput(ModelOutput):
    """The answer to a batch.

    Attributes:
        logits: (rows, ..., labels of all heads together), −inf at what is no label of a row's own head; of a language
            model its logits; None where the model has none.
        mixture: (rows, experts).
        expert: (rows,) the number of the expert of largest weight, −1 where the shared model answers alone.
        head: (rows,) the number of the expert whose head answers, −1 where there are no heads.
        last_hidden_state: of a twin of bare models.
    """

    logits: Tensor | None = None
    mixture: Tensor | None = None
    expert: Tensor | None = None
    head: Tensor | None = None
    last_hidden_state: Tensor | None = None


class TwinModel(PreTrainedModel, GenerationMixin):
    """A twin, called as a model of transformers is: `model(**batch)` routes each row and answers it.

    Every other argument of the twin's call goes along (`expert`, `mixture`, `head`, ...). Labels of all heads are in
    one space, `config.id2label`, where a name that several heads have stands once.

    Attributes:
        twin: that answers; what it can do beside this is asked of it.
    """

    config_class = TwinConfig
    main_input_name = "input_ids"
    kind: ClassVar[str] = "Model"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: TwinConfig, twin: Twin) -> None:
        from twinmerge.twin.about.config import label_space, labels_by_head

        super().__init__(config)
        self.twin = twin
        heads, architecture = twin.package.heads, twin.model.architecture
        _, places = label_space(labels_by_head(heads, architecture))
        self._places = {head: torch.tensor(at) for head, at in places.items() if heads}
        self.train(False)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *_: Any, config: Any = None, **options: Any
    ) -> Self:
        """Open a twin folder, or a hub id of one.

        Args:
            pretrained_model_name_or_path: a path or a hub id.
            config: the one that transformers read of it.
            options: `revision`, `subfolder`, `local_files_only`, and `dtype`, the dtype to answer in; "auto" is that
                of the files. `device_map` may be one device.

        Raises:
            TwinmergeError: as `Twin.from_pretrained`; a twin of another kind of models; an option that is not known.
        """
        from twinmerge.arguments import device_there, dtype_known
        from twinmerge.errors import ModelError, UsageError
        from twinmerge.twin.about.card import classes_of
        from twinmerge.twin.about.config import KINDS, kind_of_twin, twin_config
        from twinmerge.twin.twin import Twin

        how = _known(options)
        revision = f"@{how['revision']}" if how["revision"] and not os.path.isdir(pretrained_model_name_or_path) else ""
        twin = Twin.from_pretrained(
            f"{os.fspath(pretrained_model_name_or_path)}{revision}",
            subfolder=how["subfolder"] or "",
            local_files_only=bool(how["local_files_only"]),
        )
        architecture, heads = twin.model.architecture, twin.package.heads
        own = kind_of_twin(architecture, heads)
        if cls.kind not in ("Model", own):
            auto = f"AutoModel{own}" if own in KINDS else "AutoModel"
            raise ModelError(
                f"This twin is of {', '.join(sorted(classes_of(architecture, heads)))}, which {auto} opens, and not AutoModel{cls.kind}."
            )
        wanted: Any = TwinConfig.from_pretrained(
            pretrained_model_name_or_path,
            subfolder=how["subfolder"] or "",
            revision=how["revision"] or "main",
            local_files_only=bool(how["local_files_only"]),
            trust_remote_code=False,
        )
        told = twin_config(twin.experts, heads, architecture)
        for name in ("experts", "id2label", "problem_type"):
            if (name in told or name != "id2label") and _plain(getattr(wanted, name, None)) != _plain(told.get(name)):
                raise ModelError(
                    f"{name} in config.json of this twin is not what its experts and heads say. Copy the folder again, or "
                    "open it with twinmerge.Twin.from_pretrained, which goes by the heads."
                )
        if isinstance(config, TwinConfig):
            said, given = wanted.to_dict(), config.to_dict()
            if changed := [name for name, value in said.items() if name not in FREE and given.get(name) != value]:
                raise UsageError(f"A twin's {changed[0]!r} is what its folder says. Leave the option out.")
        model: Any = cls(wanted, twin)
        model.config.name_or_path = str(pretrained_model_name_or_path)
        if how["dtype"] not in (None, "auto"):
            model.to(dtype_known(how["dtype"]))
        if how["device"] is not None:
            device_there(how["device"])
            model.to(how["device"])
        found: Self = model
        return found

    def forward(self, **batch: Any) -> TwinModelOutput:
        """Answer a batch by the twin's own call.

        Args:
            batch: what the tokenizer or image processor gave, and arguments of the twin's call. `return_dict` and
                `use_cache` may be among them; the answer is always by name.

        Raises:
            TwinmergeError: as the call of a twin.
        """
        from twinmerge.errors import UsageError

        if batch.get("labels") is not None:
            raise UsageError("A twin answers, and computes no loss. Leave labels out; take the loss of the logits.")
        batch.pop("return_dict", None)
        if self.kind != "ForCausalLM":
            batch.pop("use_cache", None)
        out = self.twin(**batch)
        number = {name: i for i, name in enumerate(self.twin.experts)}
        device = out.mixture.device
        chosen = torch.tensor([-1 if name is None else number[name] for name in out.expert], device=device)
        heads = [-1] * len(out.expert) if out.head is None else [number[name] for name in out.head]
        return TwinModelOutput(
            logits=self._in_one_space(out.logits, out.head),
            mixture=out.mixture,
            expert=chosen,
            head=torch.tensor(heads, device=device),
            last_hidden_state=getattr(out.output, "last_hidden_state", None) if out.head is None else None,
        )

    def _in_one_space(self, logits: Tensor | None, heads: list[str] | None) -> Tensor | None:
        """Each row's logits at the places of its own head's labels."""
        if logits is None or heads is None or not self._places:
            return logits
        if any(len(self._places[head]) == 0 for head in heads):
            return logits
        width = 1 + max(int(at.max()) for at in self._places.values() if len(at))
        found = logits.new_full((*logits.shape[:-1], width), -torch.inf)
        for row, head in enumerate(heads):
            at = self._places[head]
            found[row][..., at.to(logits.device)] = logits[row][..., : len(at)]
        return found

    def generate(self, *inputs: Any, **options: Any) -> Any:
        """As `Twin.generate`: each row's mixture is that of its prompt."""
        options = {name: value for name, value in options.items() if value is not None}
        return self.twin.generate(*inputs, **options)

    @classmethod
    def _from_config(cls, *_: Any, **__: Any) -> NoReturn:
        """Refused: a config has no weights.

        Raises:
            UsageError: always.
        """
        from twinmerge.errors import UsageError

        raise UsageError("A twin is opened from its folder: from_pretrained, or twinmerge.Twin.from_pretrained.")

    @classmethod
    def can_generate(cls) -> bool:
        """Whether it is a language model."""
        return cls.kind == "ForCausalLM"

    def save_pretrained(self, save_directory: str | os.PathLike[str], *_: Any, **__: Any) -> None:
        """Write the twin folder, as `Twin.save_pretrained`."""
        self.twin.save_pretrained(os.fspath(save_directory))


class TwinForSequenceClassification(TwinModel):
    """A twin of classifiers of texts."""

    kind = "ForSequenceClassification"


class TwinForImageClassification(TwinModel):
    """A twin of classifiers of images."""

    kind = "ForImageClassification"
    main_input_name = "pixel_values"


class TwinForTokenClassification(TwinModel):
    """A twin of classifiers of tokens."""

    kind = "ForTokenClassification"


class TwinForCausalLM(TwinModel):
    """A twin of language models."""

    kind = "ForCausalLM"


MODELS = (
    TwinModel,
    TwinForSequenceClassification,
    TwinForImageClassification,
    TwinForTokenClassification,
    TwinForCausalLM,
)


def register_models() -> None:
    """Have transformers' auto classes and pipelines open twins."""
    from transformers.models.auto import modeling_auto

    for own in MODELS:
        auto = getattr(modeling_auto, "AutoModel" if own is TwinModel else f"AutoModel{own.kind}")
        auto.register(TwinConfig, own, exist_ok=True)
    for table, own in (
        ("SEQUENCE_CLASSIFICATION", TwinForSequenceClassification),
        ("IMAGE_CLASSIFICATION", TwinForImageClassification),
        ("TOKEN_CLASSIFICATION", TwinForTokenClassification),
        ("CAUSAL_LM", TwinForCausalLM),
    ):  # in which a pipeline looks for the class's name
        getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES")[TYPE] = own.__name__


def _plain(value: Any) -> Any:
    """Keys of a mapping as JSON has them."""
    return {str(key): each for key, each in value.items()} if isinstance(value, Mapping) else value


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of from_pretrained that a twin has a use for.

    Raises:
        UsageError: one that is not known.
    """
    from twinmerge.errors import UsageError

    found: dict[str, Any] = dict.fromkeys(("revision", "subfolder", "local_files_only", "dtype", "device"))
    for name, value in options.items():
        if name in found:
            found[name] = value
        elif name == "torch_dtype":
            found["dtype"] = value
        elif name == "device_map" and (value is None or isinstance(value, (str, torch.device, int))):
            found["device"] = None if value == "auto" else value
        elif name == "device_map" and isinstance(value, Mapping) and [*value] == [""]:
            found["device"] = value[""]
        elif not name.startswith("_") and name not in IGNORED and value is not None:
            raise UsageError(
                f"A twin takes no {name!r} here. Leave it out, or open it with twinmerge.Twin.from_pretrained."
            )
    return found
