"""`twinmerge check` and `verify`, and what a merge says about rounding, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def merged(command: Any, zoo: Any, copied: Any, tmp_path: Path) -> Any:
    """A merge of copies that may be spoilt: (output, folder of mood)."""
    mood = copied(zoo.mood)
    given = [*("--base", zoo.base), *("--expert", f"mood={mood}"), *("--expert", f"kind={zoo.kind}")]
    assert command("merge", "--method", "task_arithmetic", *given, "-o", tmp_path / "out").code == 0
    return tmp_path / "out", mood


def spoil(folder: Path, name: str) -> None:
    """Flip one bit of one value."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(torch.int32).view(-1)[3] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})


def test_verify_finds_nothing_in_a_fresh_merge(command: Any, merged: Any) -> None:
    out, _ = merged
    ran = command("verify", out)
    tensors, heads = (
        len(load_file(out / "model.safetensors")),
        sum(len(load_file(f)) for f in out.rglob("head.safetensors")),
    )
    assert ran.code == 0 and f"{4 * tensors + heads} tensors, and all files beside them, are what was read" in ran.err
    found = command("verify", out, "--json", "--no-inputs").json()
    assert found == {
        "ok": True,
        "tensors": tensors + heads,
        "changed": {},
        "missing": {},
        "unreadable": {},
        "files": {},
        "uncompared": {},
    }


def test_verify_names_what_changed(command: Any, merged: Any) -> None:
    out, mood = merged
    spoil(out, "embeddings.LayerNorm.weight")
    ran = command("verify", out, "--no-inputs")
    assert ran.code == 1 and f"'embeddings.LayerNorm.weight' of the output {out} changed" in ran.err
    assert "Copy or write it again." in ran.err and "--no-inputs" not in ran.err
    spoil(mood, "bert.pooler.dense.weight")
    ran = command("verify", out)
    assert ran.code == 1 and "'pooler.dense.weight' of the input 'mood' changed since the merge" in ran.err
    assert "--no-inputs" in ran.err


def test_verify_says_what_is_gone(command: Any, merged: Any) -> None:
    out, mood = merged
    (mood / "model.safetensors").unlink()
    ran = command("verify", out)
    assert ran.code == 1 and "the inputs cannot be opened" in ran.err and "--no-inputs" in ran.err
    (out / "twinmerge.checksums.json").write_text("{")
    ran = command("verify", out)
    assert ran.code == 1 and "twinmerge.checksums.json cannot be used" in ran.err


def test_verify_wants_a_merged_folder(command: Any, zoo: Any) -> None:
    ran = command("verify", zoo.base)
    assert ran.code == 3 and "Name a folder that twinmerge wrote" in ran.err


def test_check_says_what_a_merge_takes(command: Any, zoo: Any, tmp_path: Path) -> None:
    words = ("--method", "ties", "--base", zoo.base, *zoo.given)
    found = command("check", *words, "--dtype", "bfloat16", "--json").json()
    size = found["merged_parameters"]  # so few that the sample is all of them, once more
    assert found["read_bytes"] == 3 * 4 * 4 * size and found["output_bytes"] == 2 * size
    assert found["dtypes"]["mood"] == ["float32"] and found["output_dtypes"] == ["bfloat16"]
    ran = command("check", *words, tmp_path / "out")
    assert ran.code == 0 and "seconds at 1 GB/s" in ran.out and not (tmp_path / "out").exists()
    assert command("merge", *words, "--dry-run", "--json").json().keys() == found.keys()


def test_rounding_says_what_it_erased(command: Any, zoo: Any, tmp_path: Path) -> None:
    words = ("--method", "task_arithmetic", "--base", zoo.base, *zoo.given, "--dtype", "bfloat16", "-p", "scale=1e-3")
    ran = command("merge", *words, "-o", tmp_path / "near")
    assert ran.code == 0 and "Rounding put " in ran.err and "back to the base's value" in ran.err
    near = command("merge", *words, "-o", tmp_path / "again", "--json").json()["rounding"]
    chance = command("merge", *words, "--stochastic", "3", "-o", tmp_path / "chance", "--json").json()["rounding"]
    assert near["changed_entries"] == chance["changed_entries"] > 0
    assert near["erased_entries"] > 0.7 * near["changed_entries"] and chance["mode"] == "stochastic, seed 3"
    base, a, b = (load_file(f / "model.safetensors") for f in (zoo.base, tmp_path / "near", tmp_path / "chance"))
    exact = load_file_of(command, zoo, tmp_path)
    name = "embeddings.word_embeddings.weight"
    error = [(x[name].double() - exact[name].double()).mean().abs().item() for x in (a, b)]
    assert error[1] < 3e-4 and torch.equal(a[name], base[name].bfloat16()) is False
    provenance = json.loads((tmp_path / "chance" / "twinmerge.json").read_text())
    assert provenance["rounding"] == chance and provenance["recipe"]["stochastic"] == 3
    assert command("verify", tmp_path / "chance").code == 0


def load_file_of(command: Any, zoo: Any, tmp_path: Path) -> dict[str, torch.Tensor]:
    words = ("--method", "task_arithmetic", "--base", zoo.base, *zoo.given, "-p", "scale=1e-3")
    assert command("merge", *words, "-o", tmp_path / "exact").code == 0
    return load_file(tmp_path / "exact" / "model.safetensors")


def test_a_device_that_is_not_there(command: Any, zoo: Any, tmp_path: Path) -> None:
    ran = command("merge", "--method", "average", *zoo.given, "-o", tmp_path / "out", "--device", "warp")
    assert ran.code == 2 and "There is no device 'warp' here" in ran.err and not (tmp_path / "out").exists()


def test_the_output_is_refused_while_another_merge_writes_it(command: Any, zoo: Any, tmp_path: Path) -> None:
    from twinmerge.store.output import OutputFolder

    with OutputFolder(tmp_path / "out", key="other"):
        ran = command("merge", "--method", "average", *zoo.given, "-o", tmp_path / "out")
    assert ran.code == 4 and "out" in ran.err
