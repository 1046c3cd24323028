"""What a twin reads: texts, token ids and images, out of the rows that `measure` reads too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import twinmerge as tm
from twinmerge.errors import TwinmergeError
from twinmerge.tasks.encode import padded_tokens
from twinmerge.tasks.images import ImageFile
from twinmerge.tasks.rows import Tokens, read_inputs

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def saved(model: Any, folder: Path, names: str = "ab") -> dict[str, str]:
    """A base and experts near it."""
    model.eval().save_pretrained(folder / "base")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    for name in names:
        model.load_state_dict({n: t + 0.05 * torch.randn_like(t) for n, t in state.items()})
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in names}


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def of_words(tmp_path_factory: pytest.TempPathFactory) -> tuple[tm.Twin, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("words")
    experts = saved(BertForSequenceClassification(BertConfig(vocab_size=30, max_position_embeddings=8, **TINY)), root)
    return tm.Twin.build(str(root / "base"), experts, 4, progress=False), root


def test_token_ids_need_no_tokenizer(of_words: tuple[tm.Twin, Path], tmp_path: Path) -> None:
    twin, _ = of_words
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7], "attention_mask": [1, 1, 0, 1]}]
    inputs = read_inputs(write(tmp_path / "x.jsonl", rows))
    assert inputs == [Tokens([1, 2, 3]), Tokens([4, 5, 6, 7], [1, 1, 0, 1])]
    found = twin.predict(inputs, expert="b", detail=True)
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]]),
    }
    want = twin(**batch, expert="b").logits.softmax(-1)
    assert [p.confidence for p in found] == pytest.approx(want.amax(1).tolist(), abs=1e-6)


def test_a_router_of_token_ids_is_that_of_the_same_batch(of_words: tuple[tm.Twin, Path], tmp_path: Path) -> None:
    twin, _ = of_words
    draw = torch.Generator().manual_seed(0)
    ids = {n: torch.randint(1 + 10 * i, 11 + 10 * i, (40, 6), generator=draw) for i, n in enumerate("ab")}
    files = {n: write(tmp_path / n, [{"input_ids": row} for row in t.tolist()]) for n, t in ids.items()}
    routers = []
    for data in (
        {n: read_inputs(f.rename(f.with_suffix(".jsonl"))) for n, f in files.items()},
        {n: {"input_ids": t, "attention_mask": torch.ones_like(t)} for n, t in ids.items()},
    ):
        twin.fit_router(data, layers=[0, 2], progress=False)
        routers.append({n: t.clone() for n, t in twin.router.state_dict().items()})  # type: ignore[union-attr]
    assert all(torch.allclose(routers[0][n], t, atol=1e-5) for n, t in routers[1].items())


def test_the_command_takes_token_ids(
    of_words: tuple[tm.Twin, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # the next test's threads are not to change
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    from twinmerge.cli import app

    _, root = of_words
    draw = torch.Generator().manual_seed(0)
    given = []
    for i, name in enumerate("ab"):
        ids = torch.randint(1 + 10 * i, 11 + 10 * i, (40, 6), generator=draw).tolist()
        given += ["--data", f"{name}={write(tmp_path / f'{name}.jsonl', [{'input_ids': row} for row in ids])}"]
    experts = [word for n in "ab" for word in ("--expert", f"{n}={root / n}")]
    ran = CliRunner().invoke(
        app, ["twin", "build", "--base", str(root / "base"), *experts, *given, "-o", str(tmp_path / "twin")]
    )
    assert ran.exit_code == 0, ran.output
    assert tm.Twin.from_pretrained(tmp_path / "twin").router is not None


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([Tokens([1]), "text"], "Some inputs are token ids, and some are texts"),
        ([Tokens([])], "are no token ids"),
        ([Tokens([-1])], "are no token ids"),
        ([Tokens([1, 2], [1])], "2 token ids have 1 marks"),
        ([Tokens([30])], "embeddings of 30"),
        (["text"], "[Nn]o tokenizer"),
        ([ImageFile(Path("x.png"), "row 1"), "text"], "Some inputs are images"),
    ],
)
def test_inputs_that_cannot_be_read_are_refused(of_words: tuple[tm.Twin, Path], rows: list[Any], said: str) -> None:
    with pytest.raises(TwinmergeError, match=said):
        of_words[0].predict(rows, expert="a")


def test_rows_that_are_too_long_are_cut_and_told(of_words: tuple[tm.Twin, Path]) -> None:
    with pytest.warns(UserWarning, match="1 of 2 rows of token ids were longer than the 8"):
        found = of_words[0].predict([Tokens(list(range(1, 13))), Tokens([1])], expert="a")
    assert found[0] == of_words[0].predict([Tokens(list(range(1, 9)))], expert="a")[0]


def test_padding_on_the_left() -> None:
    found = padded_tokens([Tokens([5, 6, 7]), Tokens([8])], pad=9, side="left")
    assert found["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_images_are_what_the_processor_makes_of_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(image_size=16, patch_size=8, num_channels=3, num_labels=3, **TINY)
    experts = saved(ViTForImageClassification(config), tmp_path)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "base")
    twin = tm.Twin.build(str(tmp_path / "base"), experts, 4, progress=False)
    rng, rows = np.random.default_rng(0), []
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (20 + i, 17, 3), np.uint8)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png"})
    inputs = read_inputs(write(tmp_path / "x.jsonl", rows))
    found = twin.predict(inputs, expert="a", detail=True)
    pixels = processor(images=[Image.open(tmp_path / f"{i}.png") for i in range(3)], return_tensors="pt")
    want = twin(**pixels, expert="a").logits.softmax(-1)
    assert [p.confidence for p in found] == pytest.approx(want.amax(1).tolist(), abs=1e-6)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(TwinmergeError, match="line 2.*is no image"):
        twin.predict(inputs, expert="a")
