"""Every command has a call of the same name, and both give the same plain data; what calls give is shown in every
form."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import typer
from safetensors.torch import load_file

import twinmerge as tm
import twinmerge.cli
from twinmerge.errors import TwinmergeError
from twinmerge.methods.emr import Emr
from twinmerge.methods.task_arithmetic import TaskArithmetic
from twinmerge.moved import COMMANDS as OLD
from twinmerge.results import WIDTH, Listing, Record, Result, Rows, Table
from twinmerge.study.demo import DemoResults
from twinmerge.tasks.rows import read_inputs


class Mine(TaskArithmetic):
    """Task arithmetic of another module."""


class MyMasks(Emr):
    """EMR of another module."""


VOLATILE = {
    "seconds",
    "seconds_per_1000",
    "output",
    "file",
    "predicted",
    "measured",
    "shared_seconds",
    "chosen",
    "break_even",
}


class Pair(NamedTuple):
    """words: of a command, without --json and -o; call: the same in Python, given the output as a text; where: the
    command has -o."""

    words: list[Any]
    call: Callable[[str], Any]
    where: bool = False


@pytest.fixture(scope="module")
def made(zoo: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What some commands start from: masks, a tuned language model, an adapter, two statistics files, a state, a
    merge."""
    root = tmp_path_factory.mktemp("made")
    tm.build_masks("tall_masks", str(zoo.base), zoo.experts, root / "masks", progress=False)
    adapter = tm.extract_lora(str(zoo.alice), str(zoo.lm), root / "adapter", rank=2, progress=False).folder
    for name, rows in (("half", (0, 10)), ("rest", (10, 20))):
        tm.measure("gram", str(zoo.mood), zoo.data["mood"], root / name, rows=rows, progress=False)
    state = tm.Continual.init(root / "state", str(zoo.base), "task_arithmetic", progress=False)
    for name, model in zoo.experts.items():
        state.add(name, model)
    return SimpleNamespace(root=root, masks=root / "masks", adapter=adapter, half=root / "half", rest=root / "rest")


def saved(twin: Any, out: str | Path) -> Any:
    twin.save_pretrained(out)
    return twin.info()


def state(zoo: Any, out: str | Path, *names: str) -> tm.Continual:
    found = tm.Continual.init(out, str(zoo.base), "task_arithmetic", progress=False)
    for name in names:
        found.add(name, zoo.experts[name])
    return found


def pairs(zoo: Any, made: Any, tmp: Path) -> dict[str, Pair]:
    """Command -> both ways."""
    base, experts, given = str(zoo.base), zoo.experts, ["--base", zoo.base, *zoo.given]
    data = [word for task, file in zoo.data.items() for word in ("--data", f"{task}={file}")]
    texts = {task: read_inputs(file) for task, file in zoo.data.items()}
    suite, quiet = ["--suite", zoo.suite], {"progress": False}
    some = [*zoo.texts(0, 2, 1), *zoo.texts(1, 2, 1)]
    twin = tm.Twin.from_pretrained(zoo.twin)
    for number, folder in enumerate((tmp / "s1", tmp / "s2")):
        if number:
            state(zoo, folder, "mood", "kind")
    tm.merge("average", None, experts, tmp / "merged", **quiet)
    run = tmp / "run"
    for step, folder in enumerate((zoo.lm, zoo.alice)):
        shutil.copytree(folder, run / f"step-{step}")
    (tmp / "r.yaml").write_text(
        f"merge_method: ties\nbase_model: {zoo.lm}\nmodels: [{{model: {zoo.alice}, parameters: {{weight: [0, 1], density: 0.5}}}}]"
    )

    def built(out: str | Path) -> Any:
        found = tm.Twin.build(base, experts, 2, **quiet)
        found.fit_router(texts, **quiet)
        return saved(found, out)

    def arrived(out: str | Path) -> Any:
        found = state(zoo, out, "mood")
        return found.status()

    alone = {"alice": made.adapter, "bob": made.adapter}
    adapters = [word for name, place in alone.items() for word in ("--expert", f"{name}={place}")]
    return {
        "merge": Pair(["--method", "ties", *given], lambda out: {**tm.merge("ties", base, experts, out, **quiet).to_dict(), "smoke": None}, True),
        "check": Pair(["--method", "ties", *given], lambda out: tm.check("ties", base, experts, **quiet)),
        "checkpoints": Pair([run], lambda out: tm.merge_checkpoints(str(run), out, **quiet).to_dict(), True),
        "transplant": Pair([zoo.alice, "--tokenizer", zoo.lm, "--k", 3], lambda out: tm.transplant(str(zoo.alice), str(zoo.lm), out, k=3, **quiet), True),
        "recipe new": Pair(["ties"], lambda out: {"recipe": tm.recipe_template("ties")}),
        "recipe check": Pair([tmp / "r.yaml"], lambda out: tm.read_recipe(tmp / "r.yaml").describe()),
        "recipe explain": Pair([tmp / "r.yaml"], lambda out: tm.explain_recipe(tmp / "r.yaml")),
        "search": Pair(["--method", "task_arithmetic", *given, *suite, "--split", "train", "--limit", 6, "--grid", "scale=0.1,0.5"],
                       lambda out: tm.search(tm.merge("task_arithmetic", base, experts), str(zoo.suite), grid={"scale": [0.1, 0.5]}, split="train", limit=6, **quiet)),
        "verify": Pair([tmp / "merged"], lambda out: tm.verify(f"{tmp}/merged", **quiet)),
        "push": Pair([tmp / "merged", "me/it", "--dry-run"], lambda out: tm.push(f"{tmp}/merged", "me/it", dry_run=True, **quiet)),
        "evaluate": Pair([zoo.twin, *suite, "--limit", 6], lambda out: tm.evaluate(str(zoo.twin), str(zoo.suite), limit=6, **quiet)),
        "diff": Pair([zoo.mood, zoo.kind, "--base", zoo.base], lambda out: tm.diff(str(zoo.mood), str(zoo.kind), base, **quiet)),
        "methods": Pair([], lambda out: tm.list_methods()),
        "masks build": Pair([*given, *suite, "--split", "train", "--limit", 6],
                            lambda out: tm.build_masks("tall_masks", base, experts, out, suite=str(zoo.suite), split="train", limit=6, **quiet), True),
        "masks extract": Pair([made.masks, "kind"], lambda out: tm.extract_masked(str(made.masks), "kind", out), True),
        "measure fisher": Pair([zoo.mood, "--data", zoo.data["mood"], "--limit", 4], lambda out: tm.measure("fisher", str(zoo.mood), str(zoo.data["mood"]), out, limit=4, **quiet), True),
        "measure gram": Pair([zoo.mood, "--data", zoo.data["mood"]], lambda out: tm.measure("gram", str(zoo.mood), zoo.data["mood"], out, **quiet), True),
        "measure activations": Pair([zoo.mood, "--data", zoo.data["mood"]], lambda out: tm.measure("activations", str(zoo.mood), zoo.data["mood"], out, **quiet), True),
        "measure add": Pair([made.half, made.rest], lambda out: tm.add_statistics([str(made.half), str(made.rest)], out), True),
        "lora merge": Pair(["--base", zoo.lm, *adapters], lambda out: tm.merge_lora(str(zoo.lm), alone, out, **quiet), True),
        "lora extract": Pair([zoo.alice, "--base", zoo.lm, "--rank", 2], lambda out: tm.extract_lora(str(zoo.alice), str(zoo.lm), out, rank=2, **quiet), True),
        "twin build": Pair([*given, "--rank", 2, *data], built, True),
        "twin predict": Pair([zoo.twin, *some], lambda out: twin.predict(some, detail=True)),
        "twin explain": Pair([zoo.twin, *some], lambda out: twin.explain(twin.encoder.encode(some))),
        "twin info": Pair([zoo.twin], lambda out: twin.info()),
        "twin compress": Pair([zoo.twin, "--rank", 1, "--codec", "int8"], lambda out: saved(twin.compress(rank=1, codec="int8", **quiet), out), True),
        "twin refine": Pair([zoo.twin, "--data", f"mood={zoo.data['mood']}", "--steps", 2],
                            lambda out: saved(twin.refine({"mood": texts["mood"]}, steps=2, **quiet), out), True),
        "twin add": Pair([zoo.twin, "--expert", f"more={zoo.kind}", "--data", zoo.data["kind"]],
                         lambda out: saved(twin.add("more", str(zoo.kind), texts["kind"], **quiet), out), True),
        "twin remove": Pair([zoo.twin, "kind"], lambda out: saved(twin.remove("kind"), out), True),
        "twin rebuild": Pair([zoo.twin, *data], lambda out: saved(twin.rebuild(texts, **quiet), out), True),
        "twin export": Pair([zoo.twin, "--expert", "kind", "--lora"], lambda out: twin.export("kind", out, lora=True), True),
        "twin routers": Pair([], lambda out: tm.list_routers()),
        "continual init": Pair([tmp / "new", "--base", zoo.base, "--method", "task_arithmetic"], lambda out: state(zoo, out).status()),
        "continual add": Pair([tmp / "new", f"mood={zoo.mood}"], arrived),
        "continual remove": Pair([tmp / "s2", "kind"], lambda out: [s := state(zoo, out, "mood", "kind"), s.remove("kind")][0].status()),
        "continual materialise": Pair([made.root / "state"], lambda out: [s := tm.Continual(made.root / "state"), s.materialise(out)][0].status(), True),
        "continual status": Pair([made.root / "state"], lambda out: tm.Continual(f"{made.root}/state").status()),
        "continual twin": Pair([made.root / "state", "--rank", 2],
                               lambda out: [s := tm.Continual(made.root / "state"), s.twin(2, **quiet).save_pretrained(out)][0].status(), True),
    }  # fmt: skip


def commands() -> Iterator[str]:
    """Every command that does something, in words."""

    def below(found: Any, words: str) -> Iterator[str]:
        for name, command in getattr(found, "commands", {}).items():
            yield from below(command, f"{words} {name}".strip())
        if not hasattr(found, "commands"):
            yield words

    yield from below(typer.main.get_command(twinmerge.cli.app), "")


def steady(data: Any) -> Any:
    """Plain data without what differs from run to run."""
    if isinstance(data, dict):
        kept = {key: value for key, value in data.items() if key not in VOLATILE and key != "folder"}
        return {key: steady(value) for key, value in kept.items() if (key, type(value)) != ("shared", float)}  # seconds
    return [steady(each) for each in data] if isinstance(data, list) else data


class Read(HTMLParser):
    """Text and balance of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_shown(found: Result) -> None:
    """All forms of a result."""
    line = repr(found)
    assert line.startswith(f"{type(found).__name__}(") and line.endswith(")")
    assert "\n" not in line and len(line) <= WIDTH < 80
    page = Read(found._repr_html_())
    assert page.open == [] and line in page.text
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    again = pickle.loads(pickle.dumps(found))
    assert again.to_dict() == found.to_dict() and repr(again) == line
    if isinstance(found, Table):
        columns, rows = found._table()
        lines = found.to_csv().splitlines()
        assert lines[0].split(",")[0] == columns[0] and len(lines) >= len(found._data()[1]) + 1
        tabular = found.to_latex()
        assert tabular.count(r" \\") == len(rows) + 1 and tabular.startswith(r"\begin{tabular}{")


@pytest.mark.filterwarnings("ignore")
def test_every_command_has_a_call_that_gives_the_same(command: Any, zoo: Any, made: Any, tmp_path: Path) -> None:
    known = pairs(zoo, made, tmp_path)
    assert [*known, "demo"] and set(known) | {"demo"} == set(commands())
    for number, (name, pair) in enumerate(known.items()):
        out = tmp_path / f"c{number}"
        ran = command(*name.split(), *pair.words, *(["-o", out] if pair.where else []), "--json")
        assert ran.code == (1 if name == "diff" else 0), (name, ran.err)  # 1: they differ
        found = pair.call(f"{tmp_path}/p{number}")  # a text, where the command gives a path
        plain = found.to_dict() if isinstance(found, Result) else found
        assert steady(json.loads(ran.out)) == steady(plain), name
        assert json.loads(ran.out).keys() - VOLATILE == plain.keys() - VOLATILE if isinstance(plain, dict) else True
        if isinstance(found, Result):
            check_shown(found)
        if pair.where and name != "merge":
            assert (tmp_path / f"p{number}").exists() and out.exists(), name


def test_the_demo_gives_what_the_command_prints(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = DemoResults(command="twinmerge demo", seconds=1.5, methods={"a": {"mean": 1.0}})
    monkeypatch.setattr("twinmerge.study.demo.demo", lambda *_, **__: found)
    assert command("demo", "--out", tmp_path, "--json").json() == found.to_dict() and tm.demo() is found  # type: ignore[call-arg]
    check_shown(found)


@pytest.mark.parametrize("old", OLD)
def test_an_old_command_works_and_names_the_new_one(
    command: Any, zoo: Any, made: Any, tmp_path: Path, old: str
) -> None:
    words = {
        "compress": ["--method", "emr", "--base", zoo.base, *zoo.given, "-o", tmp_path / "old"],
        "extract": [made.masks, "mood", "-o", tmp_path / "old"],
        "twin run": [zoo.twin, "w3 w4"],
    }[old]
    ran = command(*old.split(), *words, "--json")
    first, *rest = ran.err.splitlines()
    assert (
        ran.code == 0
        and first == f"Warning: `twinmerge {old}` is `twinmerge {OLD[old]}` now. The old name goes with 0.1.0."
    )
    assert rest == []
    *group, name = old.split()
    assert f" {name} " not in command(*group, "--help").out
    assert f"Usage: twinmerge {OLD[old]}" in command(*old.split(), "--help").out


STATE = tm.Continual
ASKED: dict[str, tuple[Any, ...]] = {
    "merge": (tm.merge,),
    "check": (tm.check, tm.merge),
    "checkpoints": (tm.merge_checkpoints,),
    "recipe new": (tm.recipe_template,),
    "recipe check": (tm.read_recipe,),
    "recipe explain": (tm.explain_recipe,),
    "search": (tm.search, tm.merge),
    "transplant": (tm.transplant,),
    "verify": (tm.verify,),
    "push": (tm.push,),
    "evaluate": (tm.evaluate,),
    "diff": (tm.diff,),
    "methods": (tm.list_methods,),
    "demo": (tm.demo,),
    "masks build": (tm.build_masks,),
    "masks extract": (tm.extract_masked,),
    "measure fisher": (tm.measure,),
    "measure gram": (tm.measure,),
    "measure activations": (tm.measure,),
    "measure add": (tm.add_statistics,),
    "lora merge": (tm.merge_lora,),
    "lora extract": (tm.extract_lora,),
    "twin build": (tm.Twin.build, tm.Twin.fit_router),
    "twin predict": (tm.Twin.predict, tm.Twin.forward, tm.Twin.reply),
    "twin explain": (tm.Twin.explain,),
    "twin info": (tm.Twin.info,),
    "twin compress": (tm.Twin.compress,),
    "twin refine": (tm.Twin.refine,),
    "twin add": (tm.Twin.add,),
    "twin remove": (tm.Twin.remove,),
    "twin rebuild": (tm.Twin.rebuild,),
    "twin export": (tm.Twin.export,),
    "twin routers": (tm.list_routers,),
    "continual init": (STATE.init,),
    "continual add": (STATE, STATE.add_to_both),
    "continual remove": (STATE, STATE.remove),
    "continual materialise": (STATE, STATE.materialise),
    "continual status": (STATE.status,),
    "continual twin": (STATE, STATE.twin),
}
PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def told_otherwise() -> tuple[set[str], dict[str, set[str]]]:
    """What the page says of options that are no argument of their name: in every command, and command -> in that one."""
    text = PAGE.read_text().split("## Where an option is no argument of its name")[1].split("\n## ")[0]
    everywhere: set[str] = set()
    of: dict[str, set[str]] = {}
    for line in (line for line in text.splitlines() if line.startswith("| `")):
        *command, options, _ = (cell.strip(" `") for cell in line.strip("|").split(" | "))
        known = of.setdefault(command[0], set()) if command else everywhere
        known |= set(re.findall(r"--[a-z][a-z-]*", options))
    return everywhere, of


def words_of_options() -> Iterator[tuple[str, str, bool]]:
    """Command, long name of an option, and whether it may be repeated."""

    def below(found: Any, words: str) -> Iterator[tuple[str, str, bool]]:
        for name, command in getattr(found, "commands", {}).items():
            yield from below(command, f"{words} {name}".strip())
        if not hasattr(found, "commands"):
            for option in (each for each in found.params if each.param_type_name == "option"):
                yield words, max(option.opts, key=len), option.multiple

    yield from below(typer.main.get_command(twinmerge.cli.app), "")


def test_every_option_is_an_argument_of_its_name_or_the_page_says_what_else() -> None:
    everywhere, otherwise = told_otherwise()
    assert everywhere >= {"--output", "--parameter", "--json", "--threads"} and len(otherwise) > 8
    seen: dict[str, set[str]] = {}
    for command, option, repeated in words_of_options():
        arguments = {name for call in ASKED[command] for name in inspect.signature(call).parameters}
        name = option.strip("-").replace("-", "_")
        named = name in arguments or (repeated and f"{name}s" in arguments | {"weights"})
        said = option in otherwise.get(command, set())
        seen.setdefault(command, set()).add(option)
        if (command, option) != ("check", "--output"):  # which is only looked at
            assert named or said or option in everywhere, f"docs/python.md does not tell of {command} {option}"
        assert not (named and said) or option in ("--expert", "--plan"), (
            f"{command} {option} is an argument of its name"
        )
    for command, options in otherwise.items():
        assert options <= seen[command], f"{command} has no {', '.join(options - seen[command])}"


@pytest.mark.parametrize(
    "words",
    [
        ["search", "--method", "task_arithmetic", "--split", "train", "--grid", "scale=0.1", "--rows=4"],
        ["twin", "export", "TWIN", "--expert", "kind", "--lora", "--for", "vllm"],
    ],
    ids=" ".join,
)
def test_an_old_option_works_and_names_the_new_one(command: Any, zoo: Any, tmp_path: Path, words: list[Any]) -> None:
    more = ["--base", zoo.base, *zoo.given, "--suite", zoo.suite] if words[0] == "search" else []
    ran = command(*(zoo.twin if word == "TWIN" else word for word in words), *more, "-o", tmp_path / "out")
    old, new = ("--rows", "--limit") if words[0] == "search" else ("--for", "--server")
    own = " ".join(words[: 1 + (words[0] == "twin")])
    said = f"Warning: {old} of `twinmerge {own}` is {new} now. The old name goes with 0.1.0."
    assert ran.code == 0 and ran.err.splitlines()[0] == said
    assert old not in command(*own.split(), "--help").out


def test_a_parameter_of_the_method_is_no_argument_of_the_call(command: Any, zoo: Any, tmp_path: Path) -> None:
    for words in (["twin", "build"], ["masks", "build"], ["lora", "merge"]):
        name = "progress" if words[0] == "masks" else "rank"
        ran = command(*words, "--base", zoo.base, *zoo.given, "-p", f"{name}=3", "-o", tmp_path / "out")
        assert ran.code == 2 and f"-p {name} is no parameter of the method here" in ran.err


def test_data_of_the_one_expert_that_is_added_may_have_its_name(command: Any, zoo: Any, tmp_path: Path) -> None:
    words = ["twin", "add", zoo.twin, "--expert", f"more={zoo.kind}"]
    ran = command(*words, "--data", f"more={zoo.data['kind']}", "-o", tmp_path / "more", "--json")
    assert "more" in ran.json()["experts"]  # the router must be told of its inputs
    ran = command(*words, "--data", f"other={zoo.data['kind']}", "-o", tmp_path / "no")
    assert ran.code == 2 and "--data names 'other', and 'more' is added" in ran.err


def test_bytes_as_people_write_them(zoo: Any) -> None:
    twin = tm.Twin.from_pretrained(zoo.twin)
    whole = sum(spec.bytes for spec in twin.package.shared.specs.values())
    share = twin.compress(bytes="900%", codec="int8", progress=False)
    assert share.info().to_dict() == twin.compress(bytes=9.0 * whole, codec="int8", progress=False).info().to_dict()
    with pytest.raises(TwinmergeError, match="'many' is no number of bytes"):
        twin.compress(bytes="many", progress=False)


def test_a_twin_and_a_state_are_one_line(zoo: Any, made: Any) -> None:
    twin = tm.Twin.from_pretrained(zoo.twin)
    assert repr(twin) == "Twin(mood, kind, size on tsv, gaussian router)"
    state = repr(tm.Continual(made.root / "state"))
    assert state.startswith("Continual(task_arithmetic of mood, kind, size, in ") and len(state) <= WIDTH


def callables() -> Iterator[tuple[str, Any]]:
    """Every public call: functions, and what makes and what asks the public classes."""
    for name in tm.__all__:
        found = getattr(tm, name)
        if isinstance(found, type) and not issubclass(found, Exception):
            yield name, found
            for own in (own for own in dir(found) if not own.startswith("_")):
                each = inspect.getattr_static(found, own)
                each = getattr(each, "__func__", each)
                if callable(each) and getattr(each, "__module__", "").startswith("twinmerge."):
                    yield f"{name}.{own}", each
        elif callable(found) and not isinstance(found, type):
            yield name, found


PATHS = {"data", "file", "files", "folder", "out", "plan", "suite"}
INSIDE = {"Twin", "Twin.write"}  # made by build and from_pretrained; given an output that the library made


def test_every_call_takes_a_path_as_a_text_or_as_a_path() -> None:
    """What takes a path says both in its signature, and refuses other things in one sentence."""
    seen = set()
    for name, call in callables():
        for argument, parameter in inspect.signature(call).parameters.items():
            kind = str(parameter.annotation)
            if name in INSIDE or not (argument in PATHS or "Path" in kind) or kind in ("Any", ""):
                continue
            seen.add(f"{name} {argument}")
            assert re.search(r"\bstr\b", kind) and ("Path" in kind), (name, argument, kind)
            if not isinstance(call, type) and argument in PATHS:
                assert hasattr(call, "__wrapped__"), f"{name} takes whatever {argument} is given"
    assert {"smoke_check file", "Merge.from_plan file", "Twin.export out", "measure data", "demo out"} <= seen


def test_names_of_the_package() -> None:
    assert dir(tm) == sorted(tm.__all__) and len(set(tm.__all__)) == len(tm.__all__)
    for name in tm.__all__:
        assert getattr(tm, name).__doc__, name
    calls = "merge check diff verify build_masks extract_masked merge_lora extract_lora measure search evaluate list_methods"
    assert set(calls.split()) <= set(tm.__all__) and not {"compress", "extract"} & set(dir(tm))
    assert isinstance(tm.measure, type(tm.merge)) and not isinstance(tm.measure, ModuleType)


def test_a_merge_is_lazy_without_an_out(zoo: Any, tmp_path: Path) -> None:
    found = tm.merge("average", None, {"a": "no-one/nothing-here", "b": "no-one/nothing-there"})
    assert repr(found) == "Merge(average of a, b, not written)"
    written = tm.merge("average", None, zoo.experts, tmp_path / "out", progress=False)
    assert repr(written).startswith("Merge(average of mood, kind, size, in ") and len(repr(written)) < 80
    assert written.report is not None and tm.verify(tmp_path / "out", progress=False).ok
    recipe = tm.Recipe("average", None, zoo.experts)
    assert tm.merge(recipe).recipe is recipe and tm.check(recipe).to_dict() == tm.merge(recipe).check()
    with pytest.raises(TwinmergeError, match="A recipe says all of a merge"):
        tm.merge(recipe, scale=0.5)
    tm.check(recipe, plan=tmp_path / "plan.json")
    assert tm.Merge.from_plan(tmp_path / "plan.json").check() == tm.check(recipe)


def test_results_are_still_what_they_were(zoo: Any) -> None:
    """Named tuples unpack, mappings are indexed and merged, lists are lists."""
    checked = tm.check("average", None, zoo.experts)
    assert isinstance(checked, dict) and checked["method"] == "average" and {**checked} == checked.to_dict()
    assert json.loads(json.dumps(checked)) == json.loads(json.dumps(checked.to_dict()))
    found = tm.diff(str(zoo.mood), str(zoo.kind), progress=False)
    tensors, *_ = found
    assert (
        tensors is found[0] is found.tensors
        and found._replace(a="x").a == "x"
        and type(found._replace(a="x")) is type(found)
    )
    name, norm, *_ = found.tensors[0]
    assert (name, norm) == (found.tensors[0].name, found.tensors[0].norm)
    (only,) = tm.evaluate(str(zoo.merged), zoo.suite, limit=2, progress=False)
    assert only.setting == "head given"


def test_what_is_a_folder_or_a_file_goes_wherever_a_path_does(zoo: Any, made: Any, tmp_path: Path) -> None:
    quiet = {"progress": False}
    mood, kind = (tm.extract_masked(made.masks, name, tmp_path / name) for name in ("mood", "kind"))
    assert tm.verify(mood, **quiet).ok and str(mood) == str(tmp_path / "mood") and (mood / "config.json").is_file()
    assert tm.evaluate(mood, zoo.suite, tasks=["mood"], limit=4, **quiet).model == str(mood)
    grams = {
        name: tm.measure("gram", model, zoo.data[name], tmp_path / f"{name}.gram", **quiet)
        for name, model in (("mood", mood), ("kind", kind))
    }
    merged = tm.merge("regmean", zoo.base, {"mood": mood, "kind": kind}, tmp_path / "merged", statistics=grams, **quiet)
    assert merged.recipe.describe()["models"][0]["model"] == str(mood) and tm.verify(tmp_path / "merged", **quiet).ok
    adapter = tm.Twin.from_pretrained(zoo.twin).export("kind", tmp_path / "model")
    assert tm.diff(adapter, kind, **quiet).differs


def test_a_table_in_its_forms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Some(Listing):
        """Some."""

    found = Some({"a_b": {"x": 1.23456789, "y": '1 & <2>, "q"'}, "c": {"x": None, "y": 50}})
    assert found.to_csv(tmp_path / "t.csv") == 'name,x,y\na_b,1.23456789,"1 & <2>, ""q"""\nc,,50\n'
    assert (tmp_path / "t.csv").read_text() == found.to_csv()
    assert found.to_latex(tmp_path / "t.tex").splitlines()[2:5] == [
        "name & x & y \\\\",
        "\\hline",
        'a\\_b & 1.235 & 1 \\& \\textless{}2\\textgreater{}, "q" \\\\',
    ]
    assert (tmp_path / "t.tex").read_text() == found.to_latex() and "{lrl}" in found.to_latex()
    assert "1 &amp; &lt;2&gt;" in found._repr_html_()
    many = Some({f"n{i}": {"x": i} for i in range(40)})
    assert "and 10 more rows" in many._repr_html_() and Read(many._repr_html_()).open == []
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        TwinmergeError, match=r"to_pandas needs pandas, which is not installed. Install it \(pip install pandas\)"
    ):
        found.to_pandas()
    fake = ModuleType("pandas")
    fake.DataFrame = lambda rows, columns: (rows, columns)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", fake)
    assert found.to_pandas() == ([["a_b", 1.23456789, '1 & <2>, "q"'], ["c", None, 50]], ["name", "x", "y"])
    assert repr(Record(a=1)) == "Record(a 1)" and Rows().to_csv() == "\n" and repr(Rows()) == "Rows(0 rows)"
    long = Record(**{f"key{i}": "x" * 20 for i in range(9)})
    assert len(repr(long)) == WIDTH and repr(long).endswith("…)")


# ---------------------------------------------------------------------------------- methods of one's own


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_call_that_takes_a_method_takes_a_class_or_an_object(zoo: Any, tmp_path: Path) -> None:
    base, experts, quiet = str(zoo.base), zoo.experts, {"progress": False}
    usual, own = (
        tm.search(
            tm.merge(method, base, experts), str(zoo.suite), grid={"scale": [0.1, 0.5]}, split="train", limit=4, **quiet
        )
        for method in ("task_arithmetic", Mine)
    )
    assert [t.score for t in own.trials] == [t.score for t in usual.trials] and own.method.endswith(":Mine")

    masks = {
        name: tm.build_masks(method, base, experts, tmp_path / name, **quiet)
        for name, method in (("emr", "emr"), ("own", MyMasks))
    }
    assert masks["own"].scales == masks["emr"].scales
    for name in masks:
        tm.extract_masked(tmp_path / name, "kind", tmp_path / f"{name} kind")
    assert equal(*(load_file(tmp_path / f"{name} kind" / "model.safetensors") for name in masks))

    twins = [tm.Twin.build(base, experts, 2, shared=shared, **quiet) for shared in (Mine(scale=0.4), Mine)]
    wanted = tm.Twin.build(base, experts, 2, shared="task_arithmetic", scale=0.4, **quiet)
    assert equal(twins[0].weights_for({"mood": 1.0}), wanted.weights_for({"mood": 1.0}))
    twins[0].save_pretrained(tmp_path / "twin")
    again = tm.Twin.from_pretrained(tmp_path / "twin")
    assert again.info().shared == twins[1].info().shared and again.info().shared.endswith(":Mine")
    assert equal(again.rebuild(**quiet).weights_for({}), wanted.weights_for({}))

    state, same = (
        tm.Continual.init(tmp_path / "state", base, Mine(scale=0.5), **quiet),
        tm.Continual.init(tmp_path / "same", base, "task_arithmetic", scale=0.5, **quiet),
    )
    for each in (state, same):
        each.add("mood", experts["mood"])
    assert equal(tm.Continual(tmp_path / "state").canonical_state(), same.canonical_state())


def test_a_state_needs_a_method_that_its_folder_can_name(zoo: Any, tmp_path: Path) -> None:
    class Local(TaskArithmetic):
        """Of no module."""

    with pytest.raises(TwinmergeError, match="a class that no name leads to"):
        tm.Continual.init(tmp_path / "state", str(zoo.base), Local, progress=False)
    assert not (tmp_path / "state").exists()
