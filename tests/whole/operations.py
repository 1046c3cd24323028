"""Every kind of output on tiny models, and a process that dies, or whose disk is full, at any system call that writes.

`python operations.py kill|full|kill,full FOLDER SHARE [NAME ...]` tries `SHARE` in every hundred of the calls of
each operation and prints what went wrong as JSON. Runs are forks of one process that has imported everything, each
in a process group of its own; OMP_NUM_THREADS must be 1, since a pool of threads does not survive a fork.
"""

from __future__ import annotations

import copy
import errno
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, get_peft_model

from twinmerge.continual.continual import Continual
from twinmerge.continual.twins import twin_of
from twinmerge.engine import run
from twinmerge.engine.adapters.extract import extract_lora
from twinmerge.engine.adapters.merge import merge_lora
from twinmerge.engine.merge import Merge
from twinmerge.errors import TwinmergeError
from twinmerge.maths.threads import use_threads
from twinmerge.recipes.recipe import Recipe
from twinmerge.statistics.file import added
from twinmerge.statistics.measure import measure
from twinmerge.store import disk
from twinmerge.store.output import replace_text
from twinmerge.twin.export import export_dense, export_lora
from twinmerge.twin.masks.build import write_masks
from twinmerge.twin.masks.extract import extract_masked
from twinmerge.twin.twin import Twin

BERT = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**BERT, "num_key_value_heads": 1, "tie_word_embeddings": False}


def tuned(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))
    return model


def rows(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(8 * seed, 8 * seed + 8, (16, 4), generator=generator)}


class Zoo:
    """Models and what is made of them, in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        torch.manual_seed(0)
        base = transformers.BertModel(transformers.BertConfig(**BERT))
        base.save_pretrained(root / "base")
        (root / "base" / "vocab.txt").write_text("\n".join("abcdefghijklmnopqrstuvwx"))
        for i, name in enumerate("abc"):
            config = transformers.BertConfig(**BERT, num_labels=i + 2)
            expert = transformers.BertForSequenceClassification(config)
            expert.bert.load_state_dict(base.state_dict())
            tuned(expert, i + 1).save_pretrained(root / name)
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
        llama.save_pretrained(root / "llama")
        for i, name in enumerate("xy"):
            tuned(llama, i + 5).save_pretrained(root / name)
            adapter = get_peft_model(
                copy.deepcopy(llama), LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
            )
            tuned(adapter, i + 8).save_pretrained(root / f"lora-{name}")
        (root / "data.jsonl").write_text("".join(json.dumps({"input_ids": [i, i + 1, 3]}) + "\n" for i in range(6)))
        self.inputs = {name: rows(i) for i, name in enumerate("abc")}

    def path(self, name: str) -> str:
        return str(self.root / name)

    def recipe(self, method: str, names: str = "ab", base: str = "base", **parameters: Any) -> Recipe:
        return Recipe(method, self.path(base), {name: self.path(name) for name in names}, parameters)

    def make(self) -> None:
        """What other outputs are made of."""
        experts = {name: self.path(name) for name in "ab"}
        twin = Twin.build(self.path("base"), experts, 2, progress=False)
        twin.fit_router({n: self.inputs[n] for n in "ab"}, progress=False)
        twin.save_pretrained(self.root / "twin")
        write_masks(self.recipe("tall_masks"), self.root / "masks", progress=False)
        state = Continual.init(self.root / "state", self.path("base"), "task_arithmetic", progress=False)
        state.add("a", self.path("a"))
        for i in (0, 3):
            self.measured(self.root / f"part{i}", (i, i + 3))

    def measured(self, out: Path, chosen: tuple[int, int]) -> None:
        measure("fisher", self.path("llama"), self.root / "data.jsonl", out, rows=chosen, progress=False)

    def twin(self) -> Twin:
        return Twin.from_pretrained(self.root / "twin")

    def state(self, folder: Path) -> Continual:
        return Continual(folder, self.path("base"), progress=False)


def merge(zoo: Zoo, out: Path, processes: bool = False) -> None:
    run.LARGE = 1
    Merge(zoo.recipe("ties"), progress=False, processes=processes).save(out)


Operation = Callable[[Zoo, Path], Any]
OPERATIONS: dict[str, Operation] = {
    "merge": merge,
    "merge in processes": lambda zoo, out: merge(zoo, out, True),
    "plain merge": lambda zoo, out: Merge(zoo.recipe("task_arithmetic", "xy", "llama"), progress=False).save(out),
    "masks": lambda zoo, out: write_masks(zoo.recipe("emr"), out, progress=False),
    "extract": lambda zoo, out: extract_masked(zoo.root / "masks", "a", out),
    "twin": lambda zoo, out: zoo.twin().save_pretrained(out),
    "twin compress": lambda zoo, out: zoo.twin().compress(rank=1, codec="int8").save_pretrained(out),
    "twin refine": lambda zoo, out: (
        zoo.twin().refine({"a": zoo.inputs["a"]}, steps=2, progress=False).save_pretrained(out)
    ),
    "twin add": lambda zoo, out: (
        zoo.twin().add("c", zoo.path("c"), zoo.inputs["c"], progress=False).save_pretrained(out)
    ),
    "twin remove": lambda zoo, out: zoo.twin().remove("b").save_pretrained(out),
    "export": lambda zoo, out: export_dense(zoo.twin(), {"a": 0.5, "b": 0.5}, out),
    "export lora": lambda zoo, out: export_lora(zoo.twin(), "a", out),
    "lora merge": lambda zoo, out: merge_lora(
        zoo.path("llama"), {n: zoo.path(f"lora-{n}") for n in "xy"}, out, progress=False
    ),
    "lora extract": lambda zoo, out: extract_lora(zoo.path("x"), zoo.path("llama"), out, rank=2, progress=False),
    "state": lambda zoo, out: Continual.init(out, zoo.path("base"), "iso_c", progress=False),
    "materialise": lambda zoo, out: zoo.state(zoo.root / "state").materialise(out),
    "twin of a state": lambda zoo, out: twin_of(zoo.state(zoo.root / "state"), 2, progress=False).save_pretrained(out),
    "measure": lambda zoo, out: zoo.measured(out, (0, 6)),
    "measure add": lambda zoo, out: added([zoo.root / "part0", zoo.root / "part3"], out),
    "replace": lambda zoo, out: replace_text(out, "new"),
}
CHANGES: dict[str, Operation] = {
    "continual add": lambda zoo, out: zoo.state(out).add("b", zoo.path("b")),
    "continual remove": lambda zoo, out: zoo.state(out).remove("a"),
}
"""What changes a state that is there."""


# --------------------------------------------------------------------------------------------- faults


class Counter:
    """Counts calls over all processes, and lets something happen at one of them."""

    def __init__(self) -> None:
        self.held = mmap.mmap(-1, 8)

    @property
    def count(self) -> int:
        return int.from_bytes(self.held[:8], "little")

    def start(self, at: int, fault: Callable[..., Any]) -> None:
        self.held[:8] = bytes(8)
        whole = disk.call

        def call(function: Any, *args: Any, **more: Any) -> Any:
            number = self.count + 1
            self.held[:8] = number.to_bytes(8, "little")
            return fault(function, *args, **more) if number >= at else whole(function, *args, **more)

        disk.call = call  # type: ignore[assignment]


def dies(function: Any, *args: Any, **more: Any) -> None:
    """Killed before the call; half-way through it, where it writes many bytes."""
    if function is os.pwritev:
        fd, (buffer, *_), offset = args
        os.pwritev(fd, [buffer[: len(buffer) // 2]], offset)
    os.killpg(0, signal.SIGKILL)
    signal.pause()


def no_sync(fd: int) -> None:
    """In the place of fsync, which a death of the process does not depend on, and which takes its time."""


TAKES_SPACE = (os.pwritev, os.write, os.ftruncate, os.mkdir, no_sync)


def is_full(function: Any, *args: Any, **more: Any) -> Any:
    """No call that takes space succeeds from there on."""
    if function in TAKES_SPACE or (function is os.open and args[1] & os.O_CREAT and not os.path.exists(args[0])):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return function(*args, **more)


class Outcome(NamedTuple):
    """said: the sentence of a refusal; broke: another exception; None, None where all went well; killed."""

    said: str | None
    broke: str | None
    killed: bool


def forked(work: Callable[[], Any]) -> Outcome:
    """What comes of the work in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        told = [None, None]
        try:
            use_threads(1)
            work()
        except TwinmergeError as error:
            told = [str(error), None]
        except BaseException as error:
            told = [None, repr(error)]
        os.write(write, json.dumps(told).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    if not text:
        return Outcome(None, None, os.WIFSIGNALED(status))
    return Outcome(*json.loads(text), False)


def content(path: Path) -> dict[str, bytes] | None:
    """The bytes of all files; an empty lock is none."""
    if not path.exists():
        return None
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = {str(f.relative_to(path)): f.read_bytes() for f in files}
    return {name: data for name, data in found.items() if name != "lock" or data}


def sampled(count: int, share: int, seed: str) -> list[int]:
    """Which calls are tried: the first and the last, and some between."""
    if share >= 100:
        return list(range(1, count + 1))
    draws = random.Random(seed)
    middle = draws.sample(range(2, count), min(count - 2, max(1, count * share // 100))) if count > 2 else []
    return sorted({1, *middle, count})


def tried(zoo: Zoo, name: str, kind: str, share: int) -> Iterator[str]:
    """What goes wrong in an operation."""
    change = name in CHANGES
    operation = {**OPERATIONS, **CHANGES}[name]
    fault = {"kill": dies, "full": is_full}[kind]
    out = zoo.root / "outputs" / "out"
    counter = Counter()

    def fresh() -> None:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        if change:
            shutil.copytree(zoo.root / "state", out)

    fresh()
    before = content(out)
    first = forked(lambda: (counter.start(1 << 40, fault), operation(zoo, out)))
    wanted, count = content(out), counter.count
    if first != (None, None, False) or wanted is None or count == 0:
        yield f"{name}: it does not work at all: {first}"
        return
    for at in sampled(count, share, name):
        fresh()
        where = f"{name}, {kind} at {at} of {count}"
        outcome = forked(lambda at=at: (counter.start(at, fault), operation(zoo, out)))  # type: ignore[misc]
        if kind == "full" and outcome.broke:
            yield f"{where}: {outcome.broke}"
        after = content(out)
        if after not in (before, wanted) and not (change and _state(after) in (_state(before), _state(wanted))):
            yield f"{where}: neither the old nor the new is there: {sorted(after or ())}"
        done = _state(after) == _state(wanted) if change else after == wanted
        again = forked(lambda: operation(zoo, out))
        if again.broke or again.killed or (again.said and not done):
            yield f"{where}, then again: {again}"
        if content(out) != wanted and not (done and change and _state(content(out)) == _state(wanted)):
            yield f"{where}, then again: not the same bytes"
        if not change and not done and [p.name for p in out.parent.iterdir()] != ["out"]:
            yield f"{where}, then again: {[p.name for p in out.parent.iterdir()]} are left"


def _state(found: dict[str, bytes] | None) -> bytes | None:
    return None if found is None else found.get("state.safetensors")


def main(kind: str, folder: str, share: str, *names: str) -> None:
    os.fsync = no_sync
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    zoo = Zoo(Path(folder))
    zoo.make()
    wanted = names or [*OPERATIONS, *CHANGES]
    found = (tried(zoo, name, one, int(share)) for name in wanted for one in kind.split(","))
    print(json.dumps(list(itertools.chain.from_iterable(found))))


if __name__ == "__main__":
    main(*sys.argv[1:])
