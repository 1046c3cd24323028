"""Heads belong to the state: what is read is the old state or the new one, whole, or refused by name."""

from __future__ import annotations

import shutil
import threading

import pytest
import torch

from twinmerge.continual import continual as module
from twinmerge.continual.continual import Continual
from twinmerge.continual.heads import with_heads
from twinmerge.continual.twins import twin_of
from twinmerge.errors import TwinmergeError


def files(state):
    return sorted((state.folder / "heads").iterdir())


@pytest.fixture
def both(started):
    return started("iso_c", ["mood", "kind"])


READERS = {
    "heads": lambda state, out: state.heads(),
    "materialise": lambda state, out: state.materialise(out),
    "twin": lambda state, out: twin_of(state, 2, progress=False),
}


@pytest.mark.parametrize("read", ["heads", "materialise"])
def test_a_missing_head_is_an_error(both, tmp_path, read):
    gone = files(both)[0]
    gone.unlink()
    with pytest.raises(TwinmergeError, match=f"lacks the head .*{gone.name}"):
        READERS[read](both, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("at", [0, 20, 200, -1])
def test_a_damaged_head_is_an_error(both, at):
    raw = bytearray(files(both)[0].read_bytes())
    raw[at] ^= 1
    files(both)[0].write_bytes(raw)
    with pytest.raises(TwinmergeError, match=r"mood|kind"):
        both.heads()


def test_another_experts_head_under_the_name_is_an_error(both):
    first, second = files(both)
    shutil.copy(first, second)
    with pytest.raises(TwinmergeError, match="not what was written"):
        both.heads()


def test_a_head_of_the_old_name_is_not_the_new_one(zoo, both):
    """The same expert with another head: the state names the file by its content."""
    before = files(both)
    both.remove("mood")
    changed = zoo.models["mood"]
    kept = changed.classifier.bias.detach().clone()
    with torch.no_grad():
        changed.classifier.bias += 1
    try:
        both.add("mood", changed)
        assert torch.equal(both.heads()["mood"].tensors["classifier.bias"], kept + 1)
        assert len(files(both)) == 2 and files(both) != before
    finally:
        with torch.no_grad():
            changed.classifier.bias.copy_(kept)


@pytest.mark.parametrize("moment", ["head", "state"])
def test_dying_between_head_and_state_leaves_the_old_one(zoo, started, monkeypatch, moment):
    state = started("iso_c", ["kind"])

    def die(*args, **kwargs):
        raise SystemExit  # no Exception: nothing is tidied up, as in a kill

    patched = {"head": ("twinmerge.continual.continual.Change", die), "state": ("os.replace", die)}[moment]
    with monkeypatch.context() as patch:
        patch.setattr(*patched)
        with pytest.raises(SystemExit):
            state.add("mood", zoo.paths["mood"])
    assert list(state.heads()) == ["kind"] and state.about.names == ("kind",)
    state.add("mood", zoo.paths["mood"])
    assert list(state.heads()) == ["kind", "mood"] and len(files(state)) == 2


def test_readers_see_the_old_or_the_new_state(zoo, both):
    """Another thread adds and removes all the while; experts and heads that are read together belong together."""
    stop, wrong, reads = threading.Event(), [], []

    def read():
        while not stop.is_set():
            try:
                with with_heads(both.folder) as (state, heads):
                    reads.append(state.about.names)
                    if tuple(heads) != state.about.names:
                        wrong.append((state.about.names, tuple(heads)))
            except Exception as error:
                wrong.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    writer = Continual(both.folder, progress=False)
    for _ in range(6):
        writer.remove("mood")
        writer.add("mood", zoo.paths["mood"])
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong and len(set(reads)) > 1


def test_a_state_that_is_read_stays_what_it_was(zoo, both, tmp_path, monkeypatch):
    """An expert leaves while the merged model is being written: the folder is the model with it, and so are its
    heads."""
    wanted = both.materialise(tmp_path / "before")
    of_model, left = module.of_model, []

    def leaves(model, each, label):
        if not left:
            left.append(True)
            Continual(both.folder, progress=False).remove("mood")
        return of_model(model, each, label)

    monkeypatch.setattr(module, "of_model", leaves)
    got = both.materialise(tmp_path / "during")
    for name in ("model.safetensors", "heads.json", "README.md"):
        assert (got / name).read_bytes() == (wanted / name).read_bytes()
    assert Continual(both.folder).about.names == ("kind",)
