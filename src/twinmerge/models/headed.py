"""A body with many heads: each head is the expert's own model class around one shared body.

Longer than other files: one class puts a body and its heads together, and each kind of head is a method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from twinmerge.errors import DamagedFile, ModelError, RecipeError, UsageError
from twinmerge.models.answers import Answers, answers_of
from twinmerge.models.architecture import Architecture
from twinmerge.models.bounds import most_parameters
from twinmerge.models.conversion import as_module, conversions
from twinmerge.models.head_files import HeadSpec
from twinmerge.models.rows import batch_size, joined, rows_of, rows_of_batch
from twinmerge.models.skeleton import new_skeleton
from twinmerge.models.transformers_class import TransformersArchitecture, class_of, labels_of, position_limit


class BodyPort(nn.Module):
    """Stands where a head's class has its body: runs the shared body once, then hands out rows of what it gave."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self._body = (body,)  # a tuple, so that the body is registered once, by its owner
        self._output: ModelOutput | None = None
        self._rows: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._rows is None:
            self._output = self._body[0](*args, **kwargs)
            return self._output
        assert self._output is not None
        return rows_of(self._output, self._rows)

    def replay(self, rows: Tensor) -> None:
        self._rows = rows

    def reset(self) -> None:
        self._output = self._rows = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_body" or name.startswith("__"):  # a copy that is being made has none yet
                raise
            return getattr(self._body[0], name)


class HeadedModel(nn.Module):
    """One body, and for each expert its own head; or one whole model where there are no heads.

    Args:
        architecture: of the experts (with heads) or of the base (without).
        state: canonical name -> tensor, of the body (with heads) or of everything (without).
        heads: expert -> its head.

    Raises:
        TwinmergeError: the class has no single part that is the body; tensors are missing.
    """

    def __init__(
        self, architecture: Architecture, state: Mapping[str, Tensor], heads: Mapping[str, HeadSpec] | None = None
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.head_specs = dict(heads or {})
        head_names = {n for spec in self.head_specs.values() for n in spec.tensors}
        self.body_path = body_path(architecture, head_names) if head_names else ""
        self._most = most_parameters(len(state) + len(head_names))
        found = self._found(state)
        model = architecture.build()
        self.body: nn.Module = model.get_submodule(self.body_path) if self.body_path else model
        self._load(model, found)
        self.body.eval()
        self._groups: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._inner = self._hook_inner_heads(head_names)
        self.port = BodyPort(self.body)
        self._outer: dict[str, PreTrainedModel] = {}
        for name, head in self.head_specs.items():
            self._outer[name] = self._head_module(name, head)

    def canonical(self, module_name: str) -> str:
        """The canonical name of a parameter of `body` by its name there."""
        full = f"{self.body_path}.{module_name}" if self.body_path else module_name
        return self.architecture.of_module(full)

    def _found(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensor of each key of the body, in the shapes that the class has by its config, which takes no memory
        to find out.

        Raises:
            TwinmergeError: one is missing, or has another shape.
        """
        found_conversions = conversions(self.architecture, state)
        self.shapes = {part: tuple(state[part].shape) for each in found_conversions for part in each.parts}
        self.conversions = {part: each for each in found_conversions for part in each.parts}
        state = as_module(state, found_conversions)
        skeleton = self.architecture.skeleton
        body = skeleton.get_submodule(self.body_path) if self.body_path else skeleton
        wanted = {self.canonical(k): k for k in body.state_dict()}
        aliases = self.architecture.aliases
        found, missing = {}, []
        self._left_out: list[str] = []
        for canonical, key in wanted.items():
            source = canonical if canonical in state else aliases.get(canonical, canonical)
            own = [head.tensors[canonical] for head in self.head_specs.values() if canonical in head.tensors]
            if source in state or own:  # a head inside the body that the base lacks: any expert's holds its place
                found[key] = state[source] if source in state else own[0]
            elif self.architecture.optional(canonical):
                self._left_out.append(key)
            else:
                missing.append(canonical)
        if missing:
            raise self._lacks(missing)
        own_module = self.architecture.config is None
        _check_shapes(body, found, {key: name for name, key in wanted.items()}, "The weights hold", own_module)
        for key, own in skeleton.state_dict().items():
            name = self.architecture.of_module(key)
            shapes = {tuple(head.tensors[name].shape) for head in self.head_specs.values() if name in head.tensors}
            if shapes and tuple(own.shape) not in shapes:
                raise ModelError(
                    f"The heads hold {name!r} as {list(min(shapes))}, {type(skeleton).__name__} takes "
                    f"{list(own.shape)} by its config. Restore its config.json, or build the output again."
                )
        return found

    def _lacks(self, missing: Sequence[str]) -> ModelError:
        return ModelError(
            f"The weights lack {len(missing)} tensors of {self.architecture.model_class.__name__}, the first is "
            f"{missing[0]!r}. Take a base that has them, or build the output again."
        )

    def _made_anew(self, model: Any, key: str, dtype: torch.dtype) -> Tensor:
        """What a class makes by itself and leaves out of its files (sinusoidal places): the same numbers each time.

        Raises:
            TwinmergeError: it is made at random.
        """
        path, _, attribute = key.rpartition(".")
        module, made = self.body.get_submodule(path), []
        for seed in (0, 1):
            getattr(module, attribute).data.fill_(seed + 0.5)  # what is not set stays different
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model._init_weights(module)
            made.append(getattr(module, attribute).detach().clone())
        if not torch.equal(*made):
            raise self._lacks([self.canonical(key)])
        first: Tensor = made[0].to(dtype)
        return first

    def _load(self, model: nn.Module, given: Mapping[str, Tensor]) -> None:
        dtype = next((t.dtype for t in given.values() if t.is_floating_point()), torch.float32)
        found = {**given, **{key: self._made_anew(model, key, dtype) for key in self._left_out}}
        self.body.load_state_dict(found, strict=True, assign=True)
        tie, aliases = getattr(self.body, "tie_weights", None), self.architecture.aliases
        if tie is not None and aliases and not self.architecture.torn:
            tie()
        self.body.requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HeadedModel:
        """On the way to another device or dtype the heads go along."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in self._outer.values():
            module._apply(fn)
        self._inner = {head: {n: fn(t) for n, t in own.items()} for head, own in self._inner.items()}
        return self

    def _hook_inner_heads(self, head_names: set[str]) -> dict[str, dict[str, Tensor]]:
        """Heads may lie inside the body (a pooler): their modules answer each row with its own head's tensors.

        Returns:
            head -> canonical name -> tensor of such modules.
        """
        inside: set[str] = set()
        for path, module in self.body.named_modules():
            names = {a: self.canonical(f"{path}.{a}") for a, _ in module.named_parameters(recurse=False)}
            inner = {a: n for a, n in names.items() if n in head_names}
            if not inner:
                continue
            if any(True for _ in module.children()):
                raise RecipeError(
                    f"The tensor {next(iter(inner.values()))!r} cannot be a head: its module {path!r} has parts of its "
                    "own. Name whole layers with --head."
                )
            module.register_forward_hook(partial(self._by_head, inner))
            inside.update(inner.values())
        return {
            name: {n: self._as_body(t) for n, t in head.tensors.items() if n in inside}
            for name, head in self.head_specs.items()
        }

    def _by_head(self, names: Mapping[str, str], module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        for rows, tensors in self._groups:
            own = {a: tensors[n] for a, n in names.items() if n in tensors}
            module.__dict__.update(own)  # hides the parameters while the module runs
            try:
                y[rows] = module.forward(args[0][rows])
            finally:
                for attribute in own:
                    del module.__dict__[attribute]
        return y

    def _head_module(self, name: str, head: HeadSpec) -> PreTrainedModel:
        architecture = TransformersArchitecture(head.config, class_of(head.config), self._most)
        module = new_skeleton(head.config, architecture.model_class, self._most)
        path = body_path(architecture, set(head.tensors))
        parent, _, child = path.rpartition(".")
        setattr(module.get_submodule(parent) if parent else module, child, self.port)
        outside = {n: k for k in module.state_dict() if (n := architecture.of_module(k)) in head.tensors}
        lacking = [k for k in module.state_dict() if k not in outside.values()]
        if lost := [n for n in head.tensors if n not in outside and n not in self._inner[name]]:
            raise RecipeError(
                f"The tensor {lost[0]!r} of {name!r} cannot be a head: no layer of {type(module).__name__} holds it by "
                "itself. Leave it out of --head."
            )
        if lacking:
            raise DamagedFile(f"The head of {name!r} lacks the tensor {lacking[0]!r}. Build the output again.")
        state = {k: self._as_body(head.tensors[n]) for n, k in outside.items()}
        _check_shapes(module, state, {k: n for n, k in outside.items()}, f"The head of {name!r} holds")
        module.to_empty(device="cpu")
        module.load_state_dict(state, strict=True, assign=True)
        module.eval().requires_grad_(False)
        return module

    def _as_body(self, tensor: Tensor) -> Tensor:
        """A head's tensor in the body's dtype: a codec gives float32."""
        own = next(self.body.parameters()).dtype
        return tensor.to(own) if tensor.dtype == torch.float32 else tensor

    @property
    def outer(self) -> dict[str, PreTrainedModel]:
        """Head -> its class, with a port in place of the body."""
        return self._outer

    def inner(self, head: str) -> dict[str, Tensor]:
        """A head's tensors that lie inside the body, by canonical name."""
        return self._inner[head]

    def labels(self, head: str | None = None) -> list[str]:
        """The label names of a head, or of the model itself where there are no heads."""
        return self.head_specs[head].labels if head is not None else labels_of(self.architecture.config) or []

    def answers(self, head: str | None = None) -> Answers:
        """What the outputs of a head say, or those of the model itself where there are no heads."""
        return answers_of(vars(self.head_specs[head].config if head is not None else self.architecture.config))

    def forward(self, batch: Mapping[str, Any], heads: Sequence[str] | None = None, **options: Any) -> Any:
        """Answer a batch.

        Args:
            batch: what the tokenizer or image processor gave, leading axis = rows.
            heads: one head name per row; None only for models without heads.

        Returns:
            without heads: the model's own output. With heads: a dict of `logits` (rows, most labels of any head
                used),
            −inf beyond a row's own labels, and `output`, what the class of the first row's head returned. Heads
                without logits
            (question answering): `logits` is None, and `output` has every row's own answer.

        Raises:
            TwinmergeError: heads of different kinds in one batch.
        """
        with known_tokens(self.body, batch):
            return self._answer(batch, heads, **options)

    def _answer(self, batch: Mapping[str, Any], heads: Sequence[str] | None, **options: Any) -> Any:
        if not self._outer:
            return self.body(**batch, **options)
        size = batch_size(batch)
        if heads is None or len(heads) != size:
            raise UsageError(f"{size} rows need {size} head names, got {0 if heads is None else len(heads)}.")
        device = next(self.body.parameters()).device
        groups = {
            h: torch.tensor([i for i, name in enumerate(heads) if name == h], device=device)
            for h in dict.fromkeys(heads)
        }
        outputs: list[Any] = []
        try:
            self._groups = [(rows, self._inner[head]) for head, rows in groups.items()]
            for head, rows in groups.items():
                if not outputs:
                    outputs.append(self._outer[head](**batch, **options))
                else:
                    self.port.replay(rows)
                    outputs.append(self._outer[head](**rows_of_batch(batch, rows, size), **options))
        finally:
            self._groups = []
            self.port.reset()
        first = outputs[0]
        parts = [rows_of(first, next(iter(groups.values()))), *outputs[1:]]
        answers = [getattr(part, "logits", None) for part in parts]
        check_alike(answers, groups)
        logits = [(rows, part) for rows, part in zip(groups.values(), answers, strict=True) if part is not None]
        if not logits:  # a question answerer's: the rows of all of it, in their order
            return {"logits": None, "output": rows_of(joined(parts), torch.cat([*groups.values()]).argsort())}
        width = max(part.shape[-1] for _, part in logits)
        some = logits[0][1]
        whole = some.new_full((size, *some.shape[1:-1], width), -torch.inf)
        for rows, part in logits:
            whole[rows, ..., : part.shape[-1]] = part
        return {"logits": whole, "output": first}

    def hidden_states(self, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The hidden states of all layers, the embedding's first, each (rows, positions, width)."""
        module = next(iter(self._outer.values())) if self._outer else self.body
        if self.architecture.config is None:
            raise ModelError(
                f"{type(module).__name__} is none of transformers' models, and gives no hidden states to route on. "
                "Name the mixture yourself."
            )
        try:
            with known_tokens(self.body, batch):
                output = module(**batch, output_hidden_states=True)
        finally:
            self.port.reset()
        for key in ("hidden_states", "encoder_hidden_states"):
            if (states := getattr(output, key, None)) is not None:
                return tuple(states)
        raise ModelError(f"{type(module).__name__} gives no hidden states to route on. Name the mixture yourself.")


def check_alike(logits: Sequence[Tensor | None], heads: Iterable[str]) -> None:
    """Refuse answers that have no place in one batch: a label for each text and for each token, or logits and none."""
    if len({None if part is None else part.shape[1:-1] for part in logits}) > 1:
        raise UsageError(
            f"The heads {', '.join(heads)} answer in different shapes, so their rows cannot share a batch. Ask them "
            "apart."
        )


@contextmanager
def known_tokens(body: nn.Module, batch: Mapping[str, Any]) -> Iterator[None]:
    """Within the context a token that the model has no row for is told as that, and not as an index somewhere inside;
    so are more tokens than the model has positions for.

    Raises:
        TwinmergeError: the batch has one, or so many.
    """
    ids = batch.get("input_ids")
    try:
        yield
    except (IndexError, RuntimeError) as error:
        most = position_limit(getattr(body, "config", None))
        long = isinstance(ids, Tensor) and ids.dim() > 1 and most is not None and ids.shape[1] > most
        if long and (isinstance(error, IndexError) or "size" in str(error)):  # no memory is another matter
            raise ModelError(
                f"The batch has {batch['input_ids'].shape[1]} tokens in a row, and the model takes {most}. Cut them: truncation=True "
                "of the tokenizer."
            ) from error
        if not isinstance(error, IndexError):
            raise
        try:
            table = body.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            raise error from None
        rows = getattr(table, "num_embeddings", None)
        if rows is None or not isinstance(ids, Tensor) or not ids.numel() or int(ids.max()) < rows:
            raise
        raise ModelError(
            f"The tokenizer gives the token {int(ids.max())}, and the model has embeddings of {rows}. Take the "
            "tokenizer that belongs to the model, or a base whose embeddings were resized to it."
        ) from error


def architecture_of(heads: Mapping[str, HeadSpec], tensors: int) -> Architecture:
    """The class that runs the body of these heads: the first with the largest body, since some do without the pooler
    of others.

    Args:
        tensors: how many the body has.
    """
    first: dict[type[PreTrainedModel], HeadSpec] = {}
    for head in heads.values():
        first.setdefault(class_of(head.config), head)
    found = [
        TransformersArchitecture(head.config, kind, most_parameters(tensors + len(head.tensors)))
        for kind, head in first.items()
    ]
    return max(found, key=lambda each: sum(each.is_body(name) for name in each.parameters))


def _check_shapes(
    module: nn.Module, state: Mapping[str, Tensor], names: Mapping[str, str], what: str, own_module: bool = False
) -> None:
    """Refuse tensors of other shapes than the module's; `names` has what a user knows them by."""
    owned = module.state_dict()
    for key, found in state.items():
        own = owned[key]
        if found.shape != own.shape or found.is_floating_point() != own.is_floating_point():
            takes = f"{what} {names[key]!r} as {list(found.shape)}, {type(module).__name__} takes {list(own.shape)}"
            if own_module:
                raise ModelError(f"{takes}. Give the function that makes the module of these weights.")
            raise ModelError(f"{takes} by its config. Restore its config.json, or build the output again.")


def body_path(architecture: Architecture, head_names: set[str]) -> str:
    """The name of the one child of the class that holds everything but the heads."""
    if architecture.prefix:
        return str(architecture.prefix).removesuffix(".")
    children = {
        k.partition(".")[0] for k in architecture.skeleton.state_dict() if architecture.of_module(k) not in head_names
    }
    inside = {
        k.partition(".")[0] for k in architecture.skeleton.state_dict() if architecture.of_module(k) in head_names
    }
    if len(children) != 1 or children & inside:
        raise ModelError(
            f"The heads of {architecture.model_class.__name__} cannot be told from its body "
            f"({', '.join(sorted(children))}). "
            "Use a class whose base model is one part, or give the task's model without --head."
        )
    return str(children.pop())
