"""docs/formats.md names every key that is read and written, and no other."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

import twinmerge as tm
from twinmerge.continual.state import VERSION as STATE
from twinmerge.continual.state import AddedExpert, Description
from twinmerge.engine.plan_file import VERSION as PLAN
from twinmerge.models.head_files import HEADS_VERSION
from twinmerge.recipes.recipe import VERSION as RECIPE
from twinmerge.recipes.schema import MODEL_KEYS, RECIPE_KEYS
from twinmerge.recipes.slices import SLICE_KEYS, SOURCE_KEYS
from twinmerge.recipes.tokenizer import OWN_KEYS
from twinmerge.statistics.file import VERSION as STATISTICS
from twinmerge.store.manifest import VERSION as MANIFEST
from twinmerge.tasks.metrics import METRICS
from twinmerge.tasks.rows import FIELDS
from twinmerge.tasks.suite import SPLITS
from twinmerge.twin import TWIN_VERSION
from twinmerge.twin.package import ROUTER_VERSION, STATISTICS_VERSION

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
TEXT = PAGE.read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def rows(text: str, column: str) -> dict[str, bool]:
    """What the first column of a table names -> whether it is there at times only."""
    table = text.partition(f"| {column} |")[2].partition("\n\n")[0].splitlines()[2:]
    return {name: "at times" in line for line in table for name in re.findall(r"`([^`]+)`", line.split(" | ")[0])}


def test_keys_of_a_suite() -> None:
    assert rows(section("tasks.json"), "key").keys() == {"labels", "metric", *SPLITS}
    assert rows(section("tasks.json"), "metric").keys() == METRICS.keys()
    assert rows(section("Rows of a suite"), "key").keys() == {"text", "text_pair", "label"}


def test_the_suite_of_the_page_opens(tmp_path: Path) -> None:
    example = re.search(r"```json\n(.*?)```", section("tasks.json"), re.DOTALL)
    assert example is not None
    (tmp_path / "tasks.json").write_text(example[1])
    assert list(tm.open_suite(tmp_path)) == ["film", "bank"]
    lines = re.search(r"```json\n(.*?)```", section("Rows of a suite"), re.DOTALL)
    assert lines is not None
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "test.jsonl").write_text(lines[1])
    assert [row.label for row in tm.open_suite(tmp_path)["bank"].rows("test")] == [1, 2]


def test_keys_of_data_and_recipes() -> None:
    found = rows(section("Data files"), "key")
    assert found.keys() == {*FIELDS, "text_pair", "attention_mask", "target"}
    text = section("Recipes")
    assert rows(text, "key").keys() == set(RECIPE_KEYS) and f"our schema: {RECIPE}" in text
    of_models = rows(text.partition("Keys of an entry of `models`")[2], "key")
    assert of_models.keys() == set(MODEL_KEYS)
    slices = text.partition("Keys of a slice are")[2].partition("\n\n")[0]
    assert {*SLICE_KEYS, *SOURCE_KEYS} <= set(re.findall(r"`(\w+)`", slices))
    assert rows(text.partition("Keys of `tokenizer`")[2], "key").keys() == set(OWN_KEYS)


def test_versions_of_files() -> None:
    table = dict(re.findall(r"^\| \S+ \| `([\w ]+)` \| (\d+) \|", section("Files of our own"), re.MULTILINE))
    assert table == {
        "twin": str(TWIN_VERSION),
        "router": str(ROUTER_VERSION),
        "router statistics": str(STATISTICS_VERSION),
        "head": str(HEADS_VERSION),
        "statistics": str(STATISTICS),
        "continual": str(STATE),
    }
    assert f"the version of the format: {MANIFEST}" in section("The manifest")
    assert f"`twinmerge_plan` ({PLAN})" in section("A plan")


def printed() -> dict[str, dict[str, bool]]:
    """Command -> the keys that the page names -> whether they are there at times only."""
    part, found = TEXT.partition("\n## What `--json` prints")[2].partition("\n## ")[0], {}
    for title in re.findall(r"^### (.+)$", part, re.MULTILINE):
        found |= {command: rows(section(title), "key") for command in title.split(", ")}
    return found


def keys(data: Any, command: str) -> list[set[str]]:
    """The keys that a result has, entry by entry where it is a list or a listing."""
    many = data if isinstance(data, list) else list(data.values()) if command in ("methods", "twin routers") else [data]
    return [set(each) for each in many]


def inner(text: str) -> dict[str, set[str]]:
    """Key -> what stands in the entries of its list, as far as the page names them: "of each `a`, `b`"."""
    lines = re.findall(
        r"^\| `(\w+)` \| list[^|]*\| (?:[^|]*?)of each (?:setting |file |model )?(`[^|]*)\|$", text, re.M
    )
    return {key: set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", rest))) for key, rest in lines}


def calls() -> Any:
    """tests/cli/test_calls.py, which knows how to run every command."""
    spec = spec_from_file_location("test_calls_of_formats", Path(__file__).with_name("test_calls.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CALLS = calls()
made = CALLS.made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_every_command_prints_has_the_keys_of_the_page(command: Any, zoo: Any, made: Any, tmp_path: Path) -> None:
    known, pairs = printed(), CALLS.pairs(zoo, made, tmp_path)
    assert known.keys() == {*pairs, "demo"}
    for number, (name, pair) in enumerate(pairs.items()):
        out = tmp_path / f"c{number}"
        ran = command(*name.split(), *pair.words, *(["-o", out] if pair.where else []), "--json")
        data = json.loads(ran.out)
        for entry in keys(data, name):
            always = {key for key, at_times in known[name].items() if not at_times}
            assert always <= entry <= known[name].keys(), (name, always - entry, entry - known[name].keys())
        title = next(t for t in re.findall(r"^### (.+)$", TEXT, re.MULTILINE) if name in t.split(", "))
        for key, wanted in inner(section(title)).items():
            for entry in (data.get(key) or []) if isinstance(data, dict) else []:
                assert set(entry) <= wanted, (name, key, set(entry) - wanted)


def test_every_command_is_on_the_page() -> None:
    assert printed().keys() == set(CALLS.commands())


def test_keys_of_what_lies_in_folders(zoo: Any, made: Any) -> None:
    provenance = json.loads((zoo.merged / "twinmerge.json").read_text())
    assert rows(section("twinmerge.json"), "key").keys() == provenance.keys()
    more = set(re.findall(r"`(\w+)`", section("twinmerge.json").partition("More keys")[2]))
    twin = json.loads((zoo.twin / "twinmerge.json").read_text())
    masks = json.loads((made.masks / "twinmerge.json").read_text())
    assert (twin.keys() | masks.keys()) - provenance.keys() == {"twin", "masks"} <= more
    heads = rows(section("heads.json"), "key")
    for folder in (zoo.merged, zoo.twin):
        for entry in json.loads((folder / "heads.json").read_text()).values():
            assert {key for key, at_times in heads.items() if not at_times} <= entry.keys() <= heads.keys()
    manifest = json.loads((zoo.merged / "twinmerge.checksums.json").read_text())
    assert rows(section("The manifest"), "key").keys() == manifest.keys()


def test_keys_of_a_state() -> None:
    text = section("A state")
    assert list(rows(text, "key")) == [field.name for field in fields(Description)]
    experts = next(line for line in text.splitlines() if line.startswith("| `experts`"))
    named = re.findall(r"`(\w+)`", experts.rpartition(" | ")[2])
    assert set(named) == {field.name for field in fields(AddedExpert)}


def test_keys_of_evaluations(zoo: Any, tmp_path: Path) -> None:
    tm.evaluate(zoo.twin, zoo.suite, limit=3, out=tmp_path / "e.json", progress=False)
    for each in json.loads((tmp_path / "e.json").read_text()):
        assert rows(section("Evaluations and trials"), "key").keys() == each.keys()
