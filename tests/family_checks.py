"""What holds for each family of `families.py`, checked against stock transformers and PEFT; writes docs/families.md.

    python tests/family_checks.py [NAME ...]        # checks and prints; without names it writes docs/families.md

A cell is "yes" where what twinmerge gives equals what is computed without it, else "no", and the sentence with which
it is refused stands beside it. Whatever is neither is wrong. `make test-all` checks every family, and that the page
says what was found.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import twinmerge as tm

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, Family

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
YES = "yes"
TITLES = {
    "encoder": "Encoders of text",
    "decoder": "Decoders of text",
    "seq2seq": "Encoder-decoders",
    "vision": "Images",
    "audio": "Sounds, and series of numbers",
    "multimodal": "Words with images or sounds",
}
STEP = 0.01  # of a tuned weight


@dataclass
class Checked:
    """What was found of one family. Each cell: "yes", "by rebuild", "no: …" (a refusal), "–" (nothing to check) or
    "WRONG: …"."""

    name: str
    static: str = "–"
    loads: str = "–"
    twin: str = "–"
    adapter: str = "–"
    refusals: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not any(cell.startswith("WRONG") for cell in (self.static, self.loads, self.twin, self.adapter))


class Zoo:
    """A base and two experts of one family as folders, and as stock transformers loads them."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.model_class = getattr(transformers, family.model_class)
        base = family.model()
        made = {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)}
        for name, model in made.items():
            model.save_pretrained(folder / name)
        self.paths = {name: str(folder / name) for name in made}
        self.models = {name: self.load(folder / name)[0] for name in made}

    def load(self, where: str | Path) -> tuple[Any, dict[str, Any]]:
        model, told = self.model_class.from_pretrained(where, output_loading_info=True, trust_remote_code=False)
        return model.eval(), told

    def by_hand(self, scale: float) -> dict[str, Tensor]:
        """θ0 + λ Σt (θt − θ0) of every parameter, by its name in the module; buffers as in the base."""
        states = {name: model.state_dict() for name, model in self.models.items()}
        trained = {name for name, _ in self.models["base"].named_parameters(remove_duplicate=False)}
        found = {}
        for name, theta in states["base"].items():
            found[name] = theta
            if name in trained and theta.is_floating_point():
                found[name] = theta + scale * sum(states[e][name] - theta for e in ("a", "b"))
        return found


def tuned(model: Any, seed: int) -> Any:
    """A model whose every parameter is a little off."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(STEP * torch.randn(p.shape, generator=generator))
    return model


def difference(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """ "yes", or which tensor is off."""
    for name in sorted(got.keys() ^ wanted.keys()):
        return f"WRONG: {name} is only in one"
    for name, value in wanted.items():
        if got[name].shape != value.shape or not torch.allclose(got[name], value, rtol=1e-5, atol=1e-6, equal_nan=True):
            return f"WRONG: {name} is off"
    return YES


def told(error: Exception) -> str:
    """The beginning of a refusal, without the paths of this run."""
    text = re.sub(r"/\S*/(base|a|b|lora)\b(\+\S*/lora\b)?", r"\1", str(error)).replace("|", "\\|")
    return text.partition(". ")[0].removesuffix(".") + "."


def refused(check: Callable[[], str], to: list[str]) -> str:
    """The cell of a check; a refusal of ours is an answer, any other error is a fault."""
    try:
        return check()
    except tm.TwinmergeError as error:
        to.append(told(error))
        return "no"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def static(zoo: Zoo, found: Checked) -> str:
    """A static merge equals the sum by hand, and loads without a missing or left-over key."""
    experts = {name: zoo.paths[name] for name in ("a", "b")}
    out = tm.merge("task_arithmetic", base=zoo.paths["base"], experts=experts, scale=0.5, progress=False).save(
        zoo.folder / "out"
    )
    model, told = zoo.load(out)
    left = {key: names for key, names in told.items() if names}
    found.loads = f"WRONG: {left}" if left else YES
    return difference(model.state_dict(), zoo.by_hand(0.5))


def adapter(zoo: Zoo) -> str:
    """One LoRA of all linear layers at weight 1 equals PEFT's merge_and_unload."""
    import peft

    try:
        torch.manual_seed(3)
        base = zoo.load(zoo.paths["base"])[0]
        matrices = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Conv2d) and m.groups == 1]
        linear = any(isinstance(m, torch.nn.Linear | Conv1D) for m in base.modules())
        targets = "all-linear" if linear else matrices
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
        wrapped = peft.get_peft_model(base, config)
        with torch.no_grad():
            for p in wrapped.parameters():
                if p.requires_grad:
                    p.mul_(0.1)
        wrapped.save_pretrained(zoo.folder / "lora")
        stock = peft.PeftModel.from_pretrained(zoo.load(zoo.paths["base"])[0], zoo.folder / "lora")
        wanted = stock.merge_and_unload().state_dict()
    except Exception as error:  # no linear layer, or a class that PEFT cannot wrap
        return f"– (PEFT: {type(error).__name__})"
    ref = f"{zoo.paths['base']}+{zoo.folder / 'lora'}"
    out = tm.merge("task_arithmetic", base=zoo.paths["base"], experts={"a": ref}, scale=1.0, progress=False).save(
        zoo.folder / "with-lora"
    )
    return difference(zoo.load(out)[0].state_dict(), wanted)


MIXTURES = torch.tensor([[1.0, 0.0], [0.3, 0.6], [0.0, 1.0]])
COUPLED = {"logits_per_image", "logits_per_text", "logits_per_audio"}
"""What couples every row of a batch with every other."""


def answers(output: Any, rows: int) -> dict[str, Tensor]:
    """The tensors of an output that have an axis of rows of their own."""
    found = {key: value for key, value in output.items() if isinstance(value, Tensor) and key not in COUPLED}
    return {key: value for key, value in found.items() if value.dim() and len(value) == rows}


@torch.no_grad()
def twin(zoo: Zoo, found: Checked) -> str:
    """Every row of a mixed batch answers as the dense model of its own mixture does; with experts kept whole."""
    experts = {name: zoo.paths[name] for name in ("a", "b")}
    made = tm.Twin.build(zoo.paths["base"], experts, rank=None, shared="task_arithmetic", scale=0.5, progress=False)
    batch = zoo.family.batch(zoo.models["base"], len(MIXTURES), 6)
    shared = zoo.by_hand(0.5)
    states = {e: zoo.models[e].state_dict() for e in experts}
    wanted = []
    for row, weights in enumerate(MIXTURES.tolist()):
        dense = copy.deepcopy(zoo.models["base"])
        for name, theta in dense.named_parameters():
            own = (w * (states[e][name] - shared[name]) for e, w in zip(experts, weights, strict=True))
            theta.copy_(shared[name] + sum(own))
        wanted.append({k: v[row] for k, v in answers(dense(**batch), len(MIXTURES)).items()})
    if not wanted[0]:
        return "–"
    base = zoo.models["base"]
    once, twice = (answers(base(**batch), len(MIXTURES)) for _ in range(2))
    if any(not torch.equal(value, twice[key]) for key, value in once.items()):
        return "– (its own answer is drawn at random)"
    cell = YES
    for strategy in ("auto", "rebuild"):
        try:
            got = made(**batch, mixture=MIXTURES, strategy=strategy)
        except tm.TwinmergeError as error:
            if strategy == "rebuild" or "rebuild" not in str(error):
                raise
            cell = "by rebuild"
            found.refusals.append(told(error))
            continue
        for key, values in answers(got.output, len(MIXTURES)).items():
            for row, value in enumerate(values):
                if key in wanted[row] and not torch.allclose(value, wanted[row][key], rtol=1e-3, atol=2e-4):
                    return f"WRONG: {key} of row {row} under {strategy}"
    return cell


def check(name: str) -> Checked:
    """All cells of one family."""
    found = Checked(name)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zoo = Zoo(FAMILIES[name], Path(folder))
        found.static = refused(lambda: static(zoo, found), found.refusals)
        found.twin = refused(lambda: twin(zoo, found), found.refusals)
        found.adapter = refused(lambda: adapter(zoo), found.refusals)
    return found


def row(found: Checked) -> str:
    """The line of a family in the table."""
    family = FAMILIES[found.name]
    cells = [found.name, f"`{family.model_class}`", found.static, found.loads, found.twin, found.adapter]
    return f"| {' | '.join([*cells, ' '.join(dict.fromkeys(found.refusals))])} |"


def page(all_found: list[Checked]) -> str:
    """docs/families.md."""
    import peft

    versions = (
        f"transformers {transformers.__version__}, PEFT {peft.__version__}, torch {torch.__version__.partition('+')[0]}"
    )
    exact = sum(found.twin == YES for found in all_found)
    lines = [
        f"""# Families of transformers

{len(all_found)} families, each as a tiny random model with two experts, written and checked by

```
python tests/family_checks.py
```

with {versions}. `make test-all` runs it again and holds this page to it.

- **static**: `task_arithmetic` of two experts equals θ0 + 0.5 Σ(θt − θ0), computed by hand from what stock transformers loads, parameter by parameter.
- **loads**: stock transformers loads the merged folder without a missing, unexpected or misshapen key.
- **twin**: each row of a batch of three mixtures answers as the dense model of its own mixture does. *yes*: in one pass; *by rebuild*: such a batch is
  refused by name, and exact with `strategy="rebuild"`. {exact} of {len(all_found)} are exact in one pass.
- **adapter**: one LoRA of all linear layers (of all convolutions, where there are no others) at weight 1 equals PEFT's `merge_and_unload`. *–*: PEFT adapts
  none of the layers.

A refusal is the first words of the sentence that the user reads."""
    ]
    for kind in dict.fromkeys(FAMILIES[found.name].kind for found in all_found):
        lines += [
            f"\n## {TITLES[kind]}\n",
            "| family | class | static | loads | twin | adapter | refused with |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(row(found) for found in all_found if FAMILIES[found.name].kind == kind),
        ]
    return "\n".join(lines) + "\n"


def main(names: Sequence[str]) -> int:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    all_found = []
    for name in names or FAMILIES:
        all_found.append(check(name))
        print(row(all_found[-1]), flush=True)
    wrong = [found.name for found in all_found if not found.sound]
    print(f"{len(all_found)} families, wrong: {', '.join(wrong) or 'none'}")
    if not names:
        PAGE.write_text(page(all_found), encoding="utf-8")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
