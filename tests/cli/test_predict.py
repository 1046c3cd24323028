"""`twinmerge twin predict`: texts and files, classifiers and language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

import twinmerge as tm
from twinmerge.twin.replies.reply import prompt

TEMPLATE = "{% for m in messages %}w29 {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} w30{% endif %}"


@pytest.fixture(scope="module")
def talking(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A twin of language models that loses nothing: every matrix has full rank."""
    experts = {"alice": str(zoo.alice), "bob": str(zoo.bob)}
    folder = tmp_path_factory.mktemp("talking") / "twin"
    return tm.Twin.build(str(zoo.lm), experts, 48, progress=False).save_pretrained(folder)


def stock(model: Path, ids: torch.Tensor, tokens: int, tokenizer: Any) -> str:
    """What the expert itself writes, by transformers alone."""
    loaded = GPT2LMHeadModel.from_pretrained(model).eval()
    found = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=0)
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("expert", ["alice", "bob"])
def test_a_language_model_writes_what_the_expert_itself_writes(
    command: Any, zoo: Any, talking: Path, expert: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo.lm)
    texts = ["w3 w4", "w20 w5 w9"]
    wanted = [stock(getattr(zoo, expert), tokenizer(t, return_tensors="pt")["input_ids"], 6, tokenizer) for t in texts]
    words = ["twin", "predict", talking, *texts, "--expert", expert, "--max-new-tokens", 6]
    found = command(*words, "--json").json()
    assert [row["reply"] for row in found] == wanted and [row["text"] for row in found] == texts
    assert found[0]["mixture"] == {"alice": float(expert == "alice"), "bob": float(expert == "bob")}
    shown = command(*words)
    assert shown.code == 0 and [line.strip() for line in shown.out.splitlines()] == [w.strip() for w in wanted]
    assert shown.err.splitlines() == [f"> {texts[0]}", f"[{expert} 1.00]", f"> {texts[1]}", f"[{expert} 1.00]"]
    assert command(*words, "-q").err == ""


def test_a_reply_comes_in_pieces_by_the_template_and_within_the_model(zoo: Any, talking: Path) -> None:
    twin = tm.Twin.from_pretrained(talking)
    pieces: list[str] = []
    (found,) = twin.reply(["w3 w4"], expert="bob", max_new_tokens=99, on_text=pieces.append)
    assert "".join(pieces).strip() == found.reply.strip() and len(pieces) > 1
    limit = 16 - 3  # of the model, less the prompt
    assert found.reply == stock(zoo.bob, torch.tensor([[2, 3, 4]]), limit, twin.encoder.tokenizer)
    assert twin.reply([], expert="bob").to_dict() == []
    tokenizer = twin.encoder.tokenizer
    plain = prompt(tokenizer, "w3", None)["input_ids"]
    assert torch.equal(plain, tokenizer("w3", return_tensors="pt")["input_ids"])
    with pytest.raises(tm.TwinmergeError, match="has no chat template"):
        twin.reply(["w3"], expert="bob", chat=True)
    tokenizer.chat_template = TEMPLATE
    said = prompt(tokenizer, "w3", None)["input_ids"]
    assert said[0].tolist()[-3:] == [29, 3, 30] and torch.equal(prompt(tokenizer, "w3", False)["input_ids"], plain)
    (found,) = twin.reply(["w3"], expert="bob", max_new_tokens=3)
    assert found.reply == stock(zoo.bob, said, 3, tokenizer)
    with pytest.raises(tm.TwinmergeError, match="has 20 tokens, and the model takes 16 with its answer"):
        twin.reply(["w3 " * 19], expert="bob", chat=False)
    with pytest.raises(tm.TwinmergeError, match="some inputs are none"):
        twin.reply([("a", "b")], expert="bob")
    with pytest.raises(tm.TwinmergeError, match="is of no language model"):
        tm.Twin.from_pretrained(zoo.twin).reply(["w3"])


def test_a_broken_template_is_told_by_its_name(command: Any, zoo: Any, talking: Path, tmp_path: Path) -> None:
    twin = tm.Twin.from_pretrained(talking)
    for template in ("{{ messages[9]['content'] }}", "{% for", "{{ raise_exception('no') }}"):
        twin.encoder.tokenizer.chat_template = template
        with pytest.raises(tm.TwinmergeError, match="chat template cannot be applied"):
            twin.reply(["w3"], expert="bob", max_new_tokens=2)
        assert twin.reply(["w3"], expert="bob", max_new_tokens=2, chat=False)[0].reply is not None


def test_a_prompt_that_is_refused_says_so(command: Any, zoo: Any, talking: Path, tmp_path: Path) -> None:
    twin = tm.Twin.from_pretrained(talking)
    drawn = torch.randint(3, 29, (120, 6), generator=torch.Generator().manual_seed(0))
    twin.fit_router({"alice": {"input_ids": drawn[:60]}, "bob": {"input_ids": drawn[60:]}}, progress=False)
    assert twin.router is not None and twin.router.novelty is not None
    twin.router.novelty.limits.fill_(0.0)
    (found,) = twin.reply(["w3 w4"], max_new_tokens=4)
    assert found.refused and found.said == "refused: shared model alone"
    assert found.reply == twin.reply(["w3 w4"], mixture={"alice": 0.0, "bob": 0.0}, max_new_tokens=4)[0].reply
    assert not twin.reply(["w3 w4"], mixture={"alice": 0.0, "bob": 0.0}, max_new_tokens=4)[0].refused
    folder = twin.save_pretrained(tmp_path / "twin")
    assert "[refused: shared model alone]" in command("twin", "predict", folder, "w3 w4", "--max-new-tokens", 4).err
    assert command("twin", "predict", folder, "w3 w4", "--max-new-tokens", 4, "--json").json()[0]["refused"] is True


def test_a_file_among_the_texts_is_answered_row_by_row(
    command: Any, zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = zoo.data["kind"]
    rows = tm.read_inputs(file)
    both = command("twin", "predict", zoo.twin, "w3 w4", file, "--json")
    assert both.err == f"{file} is a file: its {len(rows)} rows are answered.\n"
    found = both.json()
    assert [row["text"] for row in found] == ["w3 w4", *rows]
    alone = command("twin", "predict", zoo.twin, "--file", file, "--json").json()
    assert [(r["text"], r["label"], r["expert"]) for r in found[1:]] == [
        (r["text"], r["label"], r["expert"]) for r in alone
    ]
    gone = command("twin", "predict", zoo.twin, "no/rows.jsonl")
    assert gone.code == 3 and "There is no file no/rows.jsonl" in gone.err
    assert command("twin", "predict", zoo.twin, "w3 is in rows.jsonl", "--json").json()[0]["text"].startswith("w3 is")
    monkeypatch.setenv("COLUMNS", "80")
    shown = command("twin", "predict", zoo.twin, file, "--soft")
    assert max(map(len, shown.out.splitlines())) <= 80 and shown.out.count(" %") >= len(rows)
    assert all(title in shown.out for title in ("text", "label", "expert", "router", "mixture"))


def test_a_head_that_is_given_is_not_taken_for_the_router_s_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from twinmerge.cli.predict import _row
    from twinmerge.twin.predict import Prediction

    routing = {"film": 0.02, "bank": 0.98}
    routed = Prediction("loan", "bank", 0.9, {"film": 0.0, "bank": 1.0}, routing, False)
    named = Prediction("negative", "film", 0.9, {"film": 0.0, "bank": 1.0}, routing, False)
    assert _row("a", routed)[3] == "bank (98 %)"
    assert _row("a", named)[3] == "film (bank 98 %)"
