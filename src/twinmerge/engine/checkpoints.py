"""Checkpoints of one training run as one model, in the place of a decay of the learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from twinmerge.arguments import at_least_one, strict
from twinmerge.engine.merge import Merge
from twinmerge.errors import DataError, UsageError
from twinmerge.recipes.recipe import Recipe

Schedule = Literal["linear", "cosine", "minus_sqrt", "ema"]
DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda u: 1.0 - u,
    "cosine": lambda u: (1.0 + math.cos(math.pi * u)) / 2.0,
    "minus_sqrt": lambda u: 1.0 - math.sqrt(u),
}
"""What the learning rate would fall by: the share that is left after the share u of the window."""
STEP = re.compile(r"\d+")
NAME = re.compile(r"(?:.*[-_])?(checkpoint|ckpt|step|iter|epoch)s?[-_]?(\d+)", re.IGNORECASE)
"""How trainers call the checkpoints of a run."""


def checkpoint_weights(count: int, schedule: Schedule = "linear", decay: float = 0.9) -> list[float]:
    """What each checkpoint counts, from the first to the last; they add up to 1.

    A decay f over the window counts the update between checkpoint j − 1 and j by w_j = f(j / n) of n checkpoints
    0 … n − 1, so that checkpoint j itself counts w_j − w_{j+1}, with w_0 = 1 and w_n = 0. Of the linear decay that is
    the mean. "ema" has weights in proportion to decay^(n − 1 − j).

    Args:
        count: n.
        schedule: f(u) = 1 − u, (1 + cos πu) / 2 or 1 − √u; or "ema".
        decay: of "ema", between 0 and 1.

    Raises:
        UsageError: an unknown schedule, a decay that is not between 0 and 1.

    Source: Tian et al. 2025, "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging", arXiv 2507.17634.

    Example:
        >>> checkpoint_weights(4), [round(w, 3) for w in checkpoint_weights(4, "minus_sqrt")]
        ([0.25, 0.25, 0.25, 0.25], [0.5, 0.207, 0.159, 0.134])
    """
    count = at_least_one("count", count)
    if schedule == "ema":
        if not 0.0 < decay < 1.0:
            raise UsageError(f"decay is {decay:g}. Give a number between 0 and 1, such as 0.9.")
        own = [decay ** (count - 1 - j) for j in range(count)]
        return [each / sum(own) for each in own]
    if schedule not in DECAYS:
        raise UsageError(f"There is no schedule {schedule!r:.80}. Choose from {', '.join(DECAYS)} and ema.")
    left = [DECAYS[schedule](j / count) for j in range(count)] + [0.0]
    return [left[j] - left[j + 1] for j in range(count)]


def checkpoints_in(folder: str | Path, allow_pickle: bool = False) -> dict[int, Path]:
    """Step -> checkpoint: the folders inside one that hold weights and are called like checkpoint-500, by step.

    Args:
        folder: of the run.
        allow_pickle: those with .bin files are taken too.

    Raises:
        DataError: no folder, none with weights inside, two of one step, names of several kinds or numbers, adapters.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Name the one that has the checkpoints inside.")
    found: dict[int, Path] = {}
    kinds: dict[str, str] = {}  # what stands before the step -> a name that has it
    for each in sorted(folder.iterdir()):
        if not each.is_dir() or not STEP.search(each.name):
            continue
        if any(each.glob("adapter_*")):
            raise DataError(
                f"{each} holds an adapter, and checkpoints of whole models are merged here. Merge the run's adapters with "
                f"`twinmerge lora merge --base B --expert s1={each} --expert s2=… -o OUT`."
            )
        pickles = sorted(each.glob("pytorch_model*.bin"))
        if not any(each.glob("*.safetensors")):
            if not pickles:
                continue
            if not allow_pickle:
                raise DataError(
                    f"{each} holds pickled weights ({pickles[0].name}). Add --allow-pickle to read its tensors."
                )
        numbers = STEP.findall(each.name)
        if not numbers:
            continue
        if len(numbers) > 1:
            raise DataError(f"{each} has several numbers in its name, so its step is not known. Rename it to step-N.")
        named = NAME.fullmatch(each.name)
        if named is None:
            raise DataError(
                f"{each} is no checkpoint of a run: its name is not like checkpoint-500. Rename it, or take it out of the "
                "folder."
            )
        kinds.setdefault(each.name[: named.start(2)], each.name)
        if len(kinds) > 1:
            raise DataError(
                f"{' and '.join(kinds.values())} in {folder} have names of two kinds, so they may be of two runs. Take one "
                "kind away."
            )
        step = int(numbers[0])
        if step in found:
            raise DataError(f"{found[step].name} and {each.name} in {folder} are of one step. Take one away.")
        found[step] = each
    if not found:
        raise DataError(
            f"{folder} has no checkpoints inside: folders such as checkpoint-500 with safetensors files. Name the run's "
            "folder."
        )
    return dict(sorted(found.items()))


@strict
def merge_checkpoints(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    schedule: str = "linear",
    last: int | None = None,
    decay: float = 0.9,
    dtype: str | None = None,
    progress: bool = True,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Merge:
    """Merge the checkpoints of a training run, as a decay of the learning rate over them would end.

    Config, tokenizer and what else lies beside the weights are those of the last checkpoint. Hundreds of checkpoints
    are read side by side, a range of each at a time.

    Args:
        folder: that has the checkpoints inside (checkpoint-500, checkpoint-1000, …).
        out: the folder to write, None to write nothing yet.
        schedule: "linear" (their mean), "cosine", "minus_sqrt" or "ema"; see `checkpoint_weights`.
        last: how many of the last checkpoints, all where None: the window, which matters most.
        decay: of "ema".
        dtype: of the output, that of the checkpoints where None.
        progress: show how far it is.
        allow_pickle: read .bin files, with torch's loader of tensors alone.
        overwrite: take the place of a folder that twinmerge wrote.

    Raises:
        TwinmergeError: as `checkpoints_in`, `checkpoint_weights` and a merge.

    Source: as `checkpoint_weights`.
    """
    found = checkpoints_in(folder, allow_pickle)
    if last is not None and at_least_one("last", last) > len(found):
        raise UsageError(f"last is {last}, and {folder} has {len(found)} checkpoints. Name that many at most.")
    steps = list(found)[-last:] if last is not None else list(found)
    weights = checkpoint_weights(len(steps), schedule, decay)  # type: ignore[arg-type]
    # the last one first: what lies beside the weights is that of the first expert
    order = [steps[-1], *steps[:-1]]
    share = dict(zip(steps, weights, strict=True))
    recipe = Recipe(
        "average",
        None,
        {f"step{step}": str(found[step]) for step in order},
        {f"step{step}.weights": share[step] for step in order},
        dtype,
        allow_pickle=allow_pickle,
    )
    merge = Merge(recipe, progress)
    if out is not None:
        merge.save(out, overwrite=overwrite)
    return merge
