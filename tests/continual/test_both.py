"""An expert comes into a state and a twin, or into neither, whatever call that writes is the last."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch

from twinmerge.continual.continual import Continual
from twinmerge.continual.twins import add_to_both, twin_of
from twinmerge.errors import TwinmergeError
from twinmerge.store import disk
from twinmerge.twin.twin import Twin

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked to be killed")


@pytest.fixture
def both(started, tmp_path):
    state = started("iso_c", ["mood"])
    twin_of(state, 2, progress=False).save_pretrained(tmp_path / "twin")
    return state


def dies(function, at: int) -> bool:
    """Whether the function, in a process of its own, dies before its call number `at` that changes the disk."""
    if (child := os.fork()) == 0:
        calls, own = iter(range(1, sys.maxsize)), disk.call

        def call(*args, **more):
            if next(calls) == at:
                os._exit(9)
            return own(*args, **more)

        disk.call = call
        try:
            function()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def answers(twin):
    ids = torch.arange(3, 9)[None]
    return twin(input_ids=ids, attention_mask=torch.ones_like(ids), expert="kind").logits


def tried(both, zoo, tmp_path, at, whole):
    """One run that dies at a call; the same again must end with both."""
    place = tmp_path / f"at{at}"
    shutil.copytree(both.folder, place / "state")

    def run():
        return add_to_both(
            Continual(place / "state", progress=False), tmp_path / "twin", place / "new", "kind", zoo.paths["kind"]
        )

    died = dies(run, at)
    state = Continual(place / "state", progress=False)  # gives the twin its name, where that was all that lacked
    assert ("kind" in state.about.names) == (place / "new").is_dir()
    if died and "kind" not in state.about.names:
        run()
    found = Twin.from_pretrained(place / "new")
    assert torch.equal(answers(found), whole) and list(found.heads if hasattr(found, "heads") else found.experts)
    assert Continual(place / "state").about.names == ("mood", "kind")
    assert sorted(path.name for path in place.iterdir()) == ["new", "state"]
    shutil.rmtree(place)
    return died


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 47])
def test_killed_before_any_call_it_is_both_or_neither(both, zoo, tmp_path, every):
    whole = answers(
        add_to_both(
            Continual(shutil.copytree(both.folder, tmp_path / "s"), progress=False),
            tmp_path / "twin",
            tmp_path / "t",
            "kind",
            zoo.paths["kind"],
        )
    )
    at = 1
    while tried(both, zoo, tmp_path, at, whole):
        at += every
    assert at > 40


def test_a_run_whose_twin_only_lacked_its_name_is_ended_by_the_same_command(both, zoo, tmp_path, monkeypatch):
    monkeypatch.setattr("twinmerge.store.output.OutputFolder._appear", lambda self: os._exit(9))
    assert dies(lambda: add_to_both(both, tmp_path / "twin", tmp_path / "new", "kind", zoo.paths["kind"]), 0)
    monkeypatch.undo()
    assert not (tmp_path / "new").exists() and (tmp_path / "new.partial").is_dir()
    made = add_to_both(
        Continual(both.folder, progress=False), tmp_path / "twin", tmp_path / "new", "kind", zoo.paths["kind"]
    )
    assert made.experts == ["mood", "kind"]
    with pytest.raises(TwinmergeError, match="is there already"):
        add_to_both(Continual(both.folder), tmp_path / "twin", tmp_path / "new", "kind", zoo.paths["kind"])


def test_an_expert_that_the_state_refuses_leaves_no_twin(both, zoo, tmp_path):
    with pytest.raises(TwinmergeError, match="has an expert 'mood' already|is there already|'mood'"):
        add_to_both(both, tmp_path / "twin", tmp_path / "new", "mood", zoo.paths["mood"])
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.partial").exists()
