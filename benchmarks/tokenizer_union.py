"""What one vocabulary of three tokenizers takes before the first number is read, and reading a table row by row.

Table: docs/performance.md, "Three tokenizers in union".

    python benchmarks/tokenizer_union.py [--tokens 128000] [--repeats 5]

Makes three BPE tokenizers of that many tokens, of which every two share half, and a table of 1,024 bfloat16 numbers for
each token. Prints processor seconds, medians of the repeats.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from kit.command import command_line
from kit.table import table
from twinmerge.engine.tokens.order import Held, ordered
from twinmerge.engine.tokens.read import read_tokens
from twinmerge.engine.tokens.rows import Filling
from twinmerge.engine.tokens.table import Table
from twinmerge.models.opened import OpenedModel
from twinmerge.recipes.tokenizer import TokenizerChoice
from twinmerge.store.checkpoint import Checkpoint, Spec
from twinmerge.store.header import header_of

WIDTH = 1024
LETTERS = "abcdefghijklmnopqrstuvwxyz"
Found = TypeVar("Found")


def make(folder: Path, count: int, seed: int) -> None:
    """A tokenizer whose merges are at random, half of them shared by all, with ids of its own; and a table."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)}
    merges: list[list[str]] = []
    pieces = [*LETTERS]
    shared, own = random.Random(0), random.Random(seed)
    while len(vocabulary) < count:
        rng = shared if len(vocabulary) < count // 2 else own
        one, other = rng.choice(pieces[:2000]), rng.choice(pieces[:2000])
        if len(one + other) < 20 and one + other not in vocabulary:
            vocabulary[one + other] = len(vocabulary)
            merges.append([one, other])
            pieces.append(one + other)
    tokens = list(vocabulary)
    own.shuffle(tokens)
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": model}))
    values = np.random.default_rng(seed).integers(0, 1 << 14, count * WIDTH, np.uint16)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header_of({"t": Spec("BF16", (count, WIDTH))}, {}))
        file.write(values.tobytes())


def median(function: Callable[[], Found], repeats: int) -> tuple[float, Found]:
    """Processor seconds, and what the last call gave."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        found = function()
        taken.append(time.process_time() - start)
    return statistics.median(taken), found


def measured(work: Path, count: int, repeats: int) -> list[tuple[str, str]]:
    """The rows of the table."""
    folders = [work / f"{i}" for i in range(3)]
    for i, folder in enumerate(folders):
        make(folder, count, i + 1)
    reading, tokens = median(lambda: [read_tokens(folder, {}) for folder in folders], repeats)
    held = {f"m{i}": Held(each, count) for i, each in enumerate(tokens) if each is not None}
    sorting, order = median(lambda: ordered(TokenizerChoice(), held["m0"], held, 0), repeats)
    filling, rows = median(lambda: Filling(order, held, {}).rows([*held], "m0"), repeats)
    models = [
        OpenedModel(folder.name, dict(opened.specs), {"t": "t"}, None, opened)
        for folder, opened in ((folder, Checkpoint([folder / "model.safetensors"])) for folder in folders)
    ]
    turned = Table("t", rows["m1"], models, WIDTH, "BF16")
    out = np.empty(order.size * WIDTH * 2, np.uint8)
    spec = Spec("BF16", (order.size, WIDTH))
    by_row, _ = median(lambda: turned.read_range(lambda start, to: None, spec, 0, out), repeats)
    plain, _ = median(lambda: models[1].read_range("t", 0, out[: count * WIDTH * 2]), repeats)
    return [
        (f"read three tokenizers of {count:,} tokens", f"{reading:.2f}"),
        (f"put them into one order of {len(order.tokens.ids):,}", f"{sorting:.2f}"),
        ("find where each row of each model comes from", f"{filling:.2f}"),
        (f"read a table of {order.size:,} × {WIDTH:,}, every row by itself", f"{by_row:.2f}"),
        (f"the same {count:,} rows in one piece", f"{plain:.2f}"),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--tokens", type=int, default=128_000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        rows = measured(Path(work), given.tokens, given.repeats)
    print("\n".join(table(["what", "processor seconds"], "lr", rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
