"""Experts come and go (check 31): nothing else changes, and adding and removing leaves the bytes that were there
before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from twinmerge.errors import TwinmergeError
from twinmerge.twin.experts import routed_to
from twinmerge.twin.package import Package
from twinmerge.twin.routers.gaussian import GaussianRouter
from twinmerge.twin.routers.kit.aggregates import FIRST, Statistics
from twinmerge.twin.routers.kit.calibration import held_out_split
from twinmerge.twin.routers.kit.fit import fit_router
from twinmerge.twin.twin import Twin

RANK = 3


def inputs(which: int) -> dict[str, Tensor]:
    """Words of a part of the vocabulary of their own."""
    generator = torch.Generator().manual_seed(which)
    return {"input_ids": torch.randint(3 + 11 * which, 14 + 11 * which, (30, 6), generator=generator)}


@pytest.fixture(scope="module")
def built(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A case of four experts, and the folder of a twin of the first three, with a router."""
    case = lab.new_case("bert", torch.float32, experts=4)
    three = {n: case.experts[n] for n in ("e0", "e1", "e2")}
    twin = Twin.build(case.base, three, RANK, progress=False)
    twin.fit_router({n: inputs(i) for i, n in enumerate(three)}, progress=False)
    return case, twin.save_pretrained(tmp_path_factory.mktemp("twin") / "three", {"e1": {"task": "stars"}})


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_check31_an_added_expert_is_itself_and_the_others_keep_every_bit(lab: Any, built: Any) -> None:
    """Check 31: at full rank the new one answers as its model; what the others know is not computed anew."""
    case, folder = built
    twin = Twin.from_pretrained(folder)
    more = twin.add("e3", case.experts["e3"], inputs(3), rank=32, progress=False)
    assert more.experts == ["e0", "e1", "e2", "e3"]
    with torch.no_grad():
        want = case.experts["e3"].eval()(**case.batch).logits
        got = more(**case.batch, expert="e3").logits[:, : want.shape[1]]
        for name in twin.experts:
            assert torch.equal(more(**case.batch, expert=name).logits, twin(**case.batch, expert=name).logits)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for name, part in twin.package.exclusive.items():
        assert more.package.exclusive[name] is part
    routed = [more(**inputs(i)).expert for i in range(4)]
    assert all(names.count(f"e{i}") >= 29 for i, names in enumerate(routed))


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_check31_serving14_add_then_remove_gives_back_the_same_bytes(built: Any, tmp_path: Path, codec: str) -> None:
    """Check 31, serving 14: the folder after both is the folder before, file by file and bit by bit."""
    case, folder = built
    start = folder
    if codec != "none":
        start = Twin.from_pretrained(folder).compress(rank=2, codec=codec).save_pretrained(tmp_path / "small")
    more = Twin.from_pretrained(start).add("e3", case.experts["e3"], inputs(3), progress=False)
    there = more.save_pretrained(tmp_path / "more")
    assert "- `e3` came from `<BertForSequenceClassification in memory>`" in (there / "README.md").read_text()
    assert b'"task": "stars"' in contents(there)["heads.json"]
    again = Twin.from_pretrained(there)
    assert again.experts[-1] == "e3"
    assert contents(again.remove("e3").save_pretrained(tmp_path / "back")) == contents(start)


def test_removing_a_first_expert_takes_its_part_and_says_so(built: Any, tmp_path: Path) -> None:
    case, folder = built
    twin = Twin.from_pretrained(folder)
    less = twin.remove("e1")
    assert less.experts == ["e0", "e2"] and list(less.package.heads) == ["e0", "e2"]
    assert less.package.provenance["twin"]["removed"] == ["e1"]
    assert twin.package.report is not None and less.package.report is None  # it is of rows of three experts
    assert "routed right  not measured of these experts" in str(less) and "% of" in str(twin)
    read = Twin.from_pretrained(less.save_pretrained(tmp_path / "read"))
    assert read.package.report is None and torch.equal(read.router.temperature, less.router.temperature)
    back = less.add("e1", case.experts["e1"], inputs(1), progress=False)
    assert back.package.report is None
    with torch.no_grad():
        assert torch.equal(less(**case.batch, expert="e2").logits, twin(**case.batch, expert="e2").logits)
    assert less(**inputs(2)).expert.count("e2") >= 29
    assert "`e1` went" in (less.save_pretrained(tmp_path / "less") / "README.md").read_text()
    single = less.remove("e0")
    assert single.router is None and single.experts == ["e2"]
    with pytest.raises(TwinmergeError, match="'e2' is the twin's only expert"):
        single.remove("e2")


def test_check31_answers_are_those_of_a_twin_that_never_had_it(lab: Any) -> None:
    """Check 31: routed, by name and mixed, to 1e-10 in float64."""
    case = lab.new_case("bert", experts=4)
    three = {n: case.experts[n] for n in ("e0", "e1", "e2")}
    twin = Twin.build(case.base, three, RANK, progress=False)
    twin.fit_router({n: inputs(i) for i, n in enumerate(three)}, progress=False)
    back = twin.add("e3", case.experts["e3"], inputs(3), progress=False).remove("e3")
    assert back.experts == twin.experts
    soft = lab.mixtures("soft")
    for choice in ({}, {"experts_per_row": None}, {"expert": "e2"}, {"mixture": soft, "head": "e1"}):
        a, b = (t(**case.batch, **choice) for t in (twin, back))
        assert torch.equal(a.mixture, b.mixture) and a.head == b.head
        assert (a.logits - b.logits).nan_to_num(0.0).abs().max() <= 1e-10


def test_serving14_statistics_of_parts_make_the_router_of_the_whole() -> None:
    """Serving 14: a router whose experts came one by one equals one that was fitted on all of them, to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(90, 5, generator=generator) + torch.arange(3).repeat_interleave(30)[:, None] * 4.0
    owners = torch.arange(3).repeat_interleave(30)
    whole = GaussianRouter().fit(z, owners, ["b", "c", "a"])
    added = Statistics.of(z[:60], owners[:60], ["b", "c"]).with_expert("a", z[60:])
    one_by_one = Statistics.of(z[:30], owners[:30], ["b"]).with_expert("c", z[30:60]).with_expert("a", z[60:])
    for found in (added, one_by_one):
        router = GaussianRouter().changed(found)
        assert relative(router.weight, whole.weight) <= 1e-6 and relative(router.bias, whole.bias) <= 1e-6
        assert relative(found.covariance(), whole.statistics.covariance()) <= 1e-6
    header, tensors = added.packed()
    back = Statistics.unpacked(json.loads(json.dumps(header, sort_keys=True)), dict(sorted(tensors.items())))
    assert torch.equal(GaussianRouter().changed(back).weight, GaussianRouter().changed(added).weight)
    assert list(back.scatters) == [FIRST, "a"] and list(back.counts.items()) == [("b", 30), ("c", 30), ("a", 30)]


def test_a_first_expert_that_goes_leaves_the_covariance_as_it_was() -> None:
    """Its rows stay in the scatter of the first ones, so they stay in the count that the scatter is divided by."""
    z = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    three = Statistics.of(z, torch.arange(90) % 3, ["a", "b", "c"])
    assert torch.equal(three.without("b").covariance(), three.covariance())


def test_the_limit_of_an_added_expert_is_set_by_rows_that_nothing_else_is_made_of() -> None:
    """A fifth of its inputs is held out, as in a fit; with fewer than the limit takes, all make its mean, and it is
    said."""
    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(3).repeat_interleave(300)
    z = 3.0 * torch.eye(4)[owners] + torch.randn(900, 4, generator=generator)
    router = GaussianRouter()
    fit_router(router, z[:600], owners[:600], ["a", "b"], novel=4, refuse=0.05)
    package = Package(None, {}, {}, router, (0,), None, {})  # type: ignore[arg-type]
    train, held = held_out_split(torch.zeros(300, dtype=torch.int64), 0)
    found = routed_to(package, "c", z[600:]).router
    assert found is not None and found.statistics is not None and found.novelty is not None
    assert found.statistics.counts["c"] == 240 == len(train)
    assert torch.equal(found.statistics.means["c"], z[600:][train].double().mean(0).float())
    own = found.novelty.distances(z[600:][held])[:, 2].sort().values
    assert float(found.novelty.limits[2]) == pytest.approx(float(own[57]), rel=1e-5)  # ⌈61 · 0.95⌉ = 58
    with pytest.warns(UserWarning, match="No input that is nearest to c will be refused: refuse=0.05 takes 19 .* 95"):
        few = routed_to(package, "c", z[600:690]).router
    assert few is not None and few.statistics is not None and few.novelty is not None
    assert few.statistics.counts["c"] == 90 and few.novelty.limits.isfinite().tolist() == [True, True, False]


def test_the_temperature_of_drawn_rows_is_that_of_rows(lab: Any) -> None:
    """Gaussian features, as the router takes them for: one temperature out of aggregates, one out of rows."""
    generator = torch.Generator().manual_seed(0)
    means = 1.5 * torch.randn(4, 8, generator=generator)
    owners = torch.arange(4).repeat_interleave(400)
    z = means[owners] + torch.randn(1600, 8, generator=generator)
    router = GaussianRouter().changed(Statistics.of(z[:1200], owners[:1200], list("abc")).with_expert("d", z[1200:]))
    assert 0.8 < float(router.temperature) < 1.25


def test_what_cannot_come_or_go(lab: Any, built: Any, tmp_path: Path) -> None:
    case, folder = built
    twin = Twin.from_pretrained(folder)
    bare = lab.new_case("bert", torch.float32).base
    strange = lab.new_case("roberta", torch.float32).experts["e0"]
    for call, says in (
        (lambda: twin.add("e1", case.experts["e3"], inputs(3)), "an expert 'e1' already"),
        (lambda: twin.add("../e3", case.experts["e3"], inputs(3)), "'../e3' is not usable"),
        (lambda: twin.add("", case.experts["e3"], inputs(3)), "'' is not usable"),
        (lambda: twin.add("e3", case.experts["e3"]), "Give inputs of its kind"),
        (lambda: twin.add("e3", strange, inputs(3)), "is a roberta model"),
        (lambda: twin.add("e3", bare, inputs(3)), "has no head, the twin's experts have one each"),
        (lambda: twin.remove("e9"), "no expert 'e9'"),
    ):
        with pytest.raises(TwinmergeError, match=says):
            call()
    copy = twin.save_pretrained(tmp_path / "copy")
    (copy / "router.statistics.safetensors").unlink()
    (copy / "twinmerge.checksums.json").unlink()  # it is on purpose
    without = Twin.from_pretrained(copy)
    assert without.router is not None
    with pytest.raises(TwinmergeError, match="keeps no statistics"):
        without.add("e3", case.experts["e3"], inputs(3), progress=False)
    with pytest.raises(TwinmergeError, match="keeps no statistics"):
        without.remove("e1")
