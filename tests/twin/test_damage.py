"""Twin folders that were damaged or changed by hand: refused in one sentence, or they answer as before."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from twinmerge.engine.calls import merge
from twinmerge.errors import TwinmergeError
from twinmerge.models.head_files import load_heads
from twinmerge.recipes.recipe import Recipe
from twinmerge.twin.masks.build import write_masks
from twinmerge.twin.twin import Twin

TWIN, ROUTER, STATISTICS = "twin.safetensors", "router.safetensors", "router.statistics.safetensors"


@pytest.fixture(scope="module")
def folders(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """classifiers: with heads and a router; writers: language models without; small: the classifiers in int8; masks:
    of the classifiers."""
    case, root = lab.new_case("bert", torch.float32), tmp_path_factory.mktemp("folders")
    twin = Twin.build(case.base, case.experts, 3, progress=False)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        n: {"input_ids": torch.randint(3 + 15 * i, 18 + 15 * i, (20, 6), generator=generator)}
        for i, n in enumerate(case.experts)
    }
    twin.fit_router(inputs, progress=False)
    made = {
        "classifiers": twin.save_pretrained(root / "classifiers"),
        "small": twin.compress(rank=2, codec="int8").save_pretrained(root / "small"),
        "masks": write_masks(Recipe("emr", case.base, case.experts), root / "masks", progress=False).folder,
        "writers": lab.new_case("gpt2", torch.float32).twin(2).save_pretrained(root / "writers"),
    }
    twin.fit_router(inputs, "mlp", progress=False)
    made["mlp"] = twin.save_pretrained(root / "mlp")
    for folder in made.values():  # which would find all of it first; test_flips.py is about that
        (folder / "twinmerge.checksums.json").unlink()
    return made


@contextmanager
def restored(file: Path) -> Iterator[Path]:
    before = file.read_bytes()
    try:
        yield file
    finally:
        file.write_bytes(before)


def refused(folder: Path, batch: dict[str, Tensor], **choice: Any) -> str:
    """What opening or calling the twin of a folder is refused with."""
    with pytest.raises(TwinmergeError) as error:
        Twin.from_pretrained(folder)(**batch, **choice)
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text


def older(head: dict[str, Any]) -> dict[str, Any]:
    """The header of the version before there were checksums, so that what is looked at besides them is reached."""
    version = 2 if head["kind"] == "twin" and "masks" not in head else head["version"] - 1
    return {key: value for key, value in head.items() if key != "checksums"} | {"version": version}


def artefact(file: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    """Write a file of ours anew with another header or other tensors."""
    with safe_open(file, "pt") as found:
        head = older(json.loads(found.metadata()["twinmerge"]))
    tensors = load_file(file)
    change(head, tensors)
    save_file(tensors, file, {"twinmerge": json.dumps(head)})


def table(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))


def first(tensors: dict[str, Tensor], start: str) -> str:
    return next(n for n in sorted(tensors) if n.startswith(start))


def put(start: str, made: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    """Another tensor in place of the first one of that name."""

    def change(head: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        name = first(tensors, start)
        tensors[name] = made(tensors[name]).contiguous()

    return change


# ---------------------------------------------------------------------------------------- the exclusive parts


@pytest.mark.few(12)
@pytest.mark.parametrize(
    "change, says",
    [
        (lambda h, t: h["experts"].reverse(), "names the experts e2, e1, e0, twinmerge.json beside it e0, e1, e2"),
        (lambda h, t: h.update(experts=["e1", "e0", "e2"]), "names the experts e1, e0, e2, twinmerge.json"),
        (lambda h, t: h.update(experts=["a", "b", "c"]), "names the experts a, b, c"),
        (lambda h, t: h["experts"].pop(), "damaged or was changed by hand"),
        (lambda h, t: h["experts"].append("e3"), "damaged"),
        (lambda h, t: h.update(experts=["e0", "e0", "e1"]), "damaged"),
        (lambda h, t: h.pop("experts"), "damaged"),
        (lambda h, t: h["energy"].pop(), "damaged"),
        (lambda h, t: h.update(energy=[{"w": -1.0}] * 3), "damaged"),
        (lambda h, t: h.update(codec="int8"), "damaged"),
        (lambda h, t: h.update(codec="zip"), "the codec 'zip', which neither"),
        (lambda h, t: h.update(version=1e400), "no twinmerge artefact"),
        (lambda h, t: t.pop(first(t, "0/a/")), "lacks one factor of 'embeddings"),
        (lambda h, t: t.pop(first(t, "0/b/")), "lacks one factor of 'embeddings"),
        (put("0/b/", lambda b: b[:, :2]), r"of the shapes [40, 2] and [3, 32], which are no pair"),
        (put("0/a/", lambda a: a[:2]), r"of the shapes [40, 3] and [2, 32], which are no pair"),
        (put("0/b/", lambda b: b.flatten()), "which are no pair"),
        (put("0/b/", lambda b: b[:-1]), "of the shape [39, 32], the weights beside it are [40, 32]"),
        (put("0/a/", lambda a: a[:, 1:]), "of the shape [40, 31], the weights beside it are [40, 32]"),
        (put("1/v/", lambda v: v[:-1]), "of the shape [31], the weights beside it are [32]"),
        (put("1/v/", lambda v: v[None]), "of the shape [1, 32], the weights beside it are [32]"),
        (put("0/b/", lambda b: b.long()), "damaged"),
        (put("0/b/", lambda b: b * torch.nan), "'embeddings.position_embeddings.weight' holds NaN"),
        (put("0/v/", lambda v: v / 0), "'embeddings.LayerNorm.bias' holds NaN or infinity"),
        (lambda h, t: t.update({"0/v/new.weight": torch.ones(3)}), "no parameter 'new.weight'"),
        (lambda h, t: t.update({"0/w/new.weight": torch.ones(3)}), "damaged"),
        (lambda h, t: t.update({"-1/v/pooler.dense.bias": torch.ones(32)}), "damaged"),
        (lambda h, t: t.update({"7/v/pooler.dense.bias": torch.ones(32)}), "damaged"),
        (lambda h, t: t.update(more=torch.ones(3)), "damaged"),
    ],
)
def test_exclusive_parts_that_were_changed(lab: Any, folders: Any, change: Any, says: str) -> None:
    batch = lab.case("bert", torch.float32).batch
    with restored(folders["classifiers"] / TWIN) as file:
        artefact(file, change)
        assert says in refused(folders["classifiers"], batch, expert="e0")
    assert Twin.from_pretrained(folders["classifiers"])(**batch, expert="e0").logits.isfinite().any()


def test_an_expert_of_nan_harms_nobody_else(lab: Any, folders: Any) -> None:
    batch = lab.case("bert", torch.float32).batch
    want = Twin.from_pretrained(folders["classifiers"])(**batch, expert="e1").logits
    with restored(folders["classifiers"] / TWIN) as file:
        artefact(file, put("0/b/", lambda b: b * torch.nan))
        assert torch.equal(Twin.from_pretrained(folders["classifiers"])(**batch, expert="e1").logits, want)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '"x"', '{"kind": "twin"}', "[" * 100_000, "{" * 9, "\ud7ff"])
def test_a_header_that_is_no_header(lab: Any, folders: Any, text: str) -> None:
    with restored(folders["classifiers"] / TWIN) as file:
        save_file(load_file(file), file, {"twinmerge": text})
        assert "no twinmerge artefact" in refused(folders["classifiers"], {})


# ---------------------------------------------------------------------------------------- the router


@pytest.mark.parametrize(
    "folder, name, change, says",
    [
        ("classifiers", ROUTER, put("weight", lambda w: w[:, :10]), "reads 10 features of each input, got 64"),
        ("classifiers", ROUTER, lambda h, t: h.update(layers=[1]), "reads 64 features of each input, got 32"),
        ("classifiers", ROUTER, lambda h, t: h.update(layers=[1, 99]), "layer 99, the model's last is 2"),
        ("classifiers", ROUTER, lambda h, t: h.update(layers=[]), "cannot read the layers []"),
        ("classifiers", ROUTER, lambda h, t: h.update(layers=["a"]), "damaged"),
        ("classifiers", ROUTER, lambda h, t: h.pop("layers"), "damaged"),
        ("classifiers", ROUTER, lambda h, t: h.pop("router"), "damaged"),
        ("classifiers", ROUTER, lambda h, t: t.pop("bias"), "damaged"),
        (
            "classifiers",
            ROUTER,
            lambda h, t: t.update(weight=t["weight"][:2].clone(), bias=t["bias"][:2].clone()),
            "chooses between 2 experts, the twin has 3",
        ),
        ("classifiers", ROUTER, put("bias", lambda b: b[:2]), "do not fit its kind 'gaussian'"),
        ("classifiers", ROUTER, put("weight", lambda w: w * torch.nan), "holds NaN"),
        ("classifiers", ROUTER, put("temperature", torch.zeros_like), "temperature that is not above 0"),
        ("mlp", ROUTER, lambda h, t: h.update(width=31), "do not fit its kind 'mlp'"),
        ("mlp", ROUTER, lambda h, t: h.pop("width"), "damaged"),
        ("mlp", ROUTER, lambda h, t: h.update(experts=2), "do not fit its kind 'mlp'"),
        ("classifiers", STATISTICS, lambda h, t: h.update(experts=["e1", "e0", "e2"]), "names the experts e1, e0, e2"),
        ("classifiers", STATISTICS, lambda h, t: h["counts"].pop(), "damaged"),
        ("classifiers", STATISTICS, lambda h, t: t.pop("scatter/0"), "damaged"),
        ("classifiers", STATISTICS, put("scatter/0", lambda s: s[1:]), "damaged"),
    ],
)
def test_routers_that_were_changed(lab: Any, folders: Any, folder: str, name: str, change: Any, says: str) -> None:
    with restored(folders[folder] / name) as file:
        artefact(file, change)
        assert says in refused(folders[folder], lab.case("bert", torch.float32).batch)


# ---------------------------------------------------------------------------------------- tables and configs


@pytest.mark.parametrize(
    "folder, name, change, says",
    [
        ("classifiers", "heads.json", lambda t: t.pop("e1"), "names the experts e0, e2, the folder heads beside it e0, e1"),
        ("classifiers", "heads.json", lambda t: t.update(e7={}), "head.safetensors is missing"),
        ("classifiers", "heads.json", lambda t: t.update(e1=3), "says nothing of the expert 'e1'"),
        ("classifiers", "heads/e1/config.json", lambda t: t.update(hidden_size=64), "e1/config.json is damaged or was changed"),
        ("classifiers", "heads/e0/config.json", lambda t: t.update(id2label={"0": "x"}), "e0/config.json is damaged or was"),
        ("classifiers", "shared/config.json", lambda t: t.update(num_attention_heads=5), "not a multiple"),
        ("classifiers", "shared/config.json", lambda t: t.update(hidden_size="a"), "is not a config that transformers"),
        ("classifiers", "shared/config.json", lambda t: t.update(model_type="none"), "is not a config that transformers"),
        ("writers", "shared/config.json", lambda t: t.update(vocab_size=10), "is [50, 32], by its config it is [10, 32]"),
        ("writers", "shared/config.json", lambda t: t.update(n_embd=64), "Restore the config.json that was saved"),
        ("writers", "shared/config.json", lambda t: t.update(n_layer=3), "The weights lack 12 tensors"),
        ("writers", "shared/config.json", lambda t: t.update(n_layer=1), "no parameter 'h.1"),
        ("writers", "shared/config.json", lambda t: t.update(architectures=["logging"]), "cannot be made from its config"),
        ("writers", "shared/config.json", lambda t: t.update(activation_function="none"), "cannot be made from its config"),
    ],
)  # fmt: skip
def test_tables_and_configs_that_were_changed(
    lab: Any, folders: Any, folder: str, name: str, change: Any, says: str
) -> None:
    with restored(folders[folder] / name) as file:
        table(file, change)
        assert says in refused(folders[folder], lab.case("bert", torch.float32).batch, expert="e0")


@pytest.mark.parametrize("name", ["heads.json", "twinmerge.json"])
@pytest.mark.parametrize("data", [b"{", b"[]", b"3", b"\xff\xfe", b'{"a": ' * 5000, b""])
def test_tables_that_are_none(folders: Any, name: str, data: bytes) -> None:
    with restored(folders["classifiers"] / name) as file:
        file.write_bytes(data)
        said = refused(folders["classifiers"], {})
        assert f"{name} cannot be read: " in said and "Copy the whole folder again" in said


def test_a_table_of_heads_that_is_gone(folders: Any) -> None:
    with restored(folders["classifiers"] / "heads.json") as file:
        file.unlink()
        assert "names the experts nobody, the folder heads beside it e0, e1, e2" in refused(folders["classifiers"], {})


def test_heads_that_changed_places(folders: Any) -> None:
    where = folders["classifiers"] / "heads"
    places = (("e0", "x"), ("e1", "e0"), ("x", "e1"))
    try:
        for old, new in places:
            (where / old).rename(where / new)
        assert "heads/e0 holds the head of 'e1'" in refused(folders["classifiers"], {}).replace("\\", "/")
    finally:
        for old, new in reversed(places):
            (where / new).rename(where / old)


def test_heads_of_a_static_merge_are_read_as_strictly(lab: Any, tmp_path: Path) -> None:
    case = lab.case("bert", torch.float32)
    folder = tmp_path / "merged"
    merge("average", base=case.base, experts=case.experts, progress=False).save(folder)
    assert list(load_heads(folder)) == case.names
    (folder / "twinmerge.checksums.json").unlink()
    (folder / "heads.json").write_text("{")
    with pytest.raises(TwinmergeError, match="heads.json cannot be read: .*Copy the whole folder again"):
        load_heads(folder)


# ---------------------------------------------------------------------------------------- anything at all


JUNK = [None, True, 0, -1, 1, 7, 2.5, float("nan"), "", "e1", "x", [], ["e0"], [1, 2], {}, {"e0": 1}]


def places(found: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value."""
    inside = (
        list(found.items()) if isinstance(found, dict) else list(enumerate(found)) if isinstance(found, list) else []
    )
    return [at, *(p for key, value in inside for p in places(value, (*at, key)))]


def spoiled(found: Any, draw: random.Random) -> Any:
    """With one value replaced, left out or doubled."""
    at = draw.choice(places(found))
    if not at:
        return draw.choice(JUNK)
    parent = found
    for key in at[:-1]:
        parent = parent[key]
    how = draw.choice(["replace", "replace", "drop", "swap"])
    if how == "drop":
        del parent[at[-1]]
    elif how == "swap" and isinstance(parent, list):
        draw.shuffle(parent)
    else:
        parent[at[-1]] = draw.choice(JUNK)
    return found


def opens_or_says_why(folder: Path, calls: Callable[[Twin], Any] | None) -> None:
    """The twin opens and answers, or one sentence says what is wrong."""
    said = ""
    try:
        twin = Twin.from_pretrained(folder)
        if calls is not None:
            calls(twin)
    except TwinmergeError as error:
        said = str(error)
    assert "\n" not in said
    assert not said or said.endswith((".", "?")) or "python -c" in said


FUZZ = settings(
    max_examples=settings().max_examples // 4,  # 10, with the slow tests 25
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SPOILED = [
    ("classifiers", TWIN),
    ("small", TWIN),
    ("masks", TWIN),
    ("classifiers", ROUTER),
    ("mlp", ROUTER),
    ("classifiers", STATISTICS),
    ("classifiers", "heads/e1/head.safetensors"),
    ("small", "heads/e1/head.safetensors"),
    ("classifiers", "heads.json"),
    ("classifiers", "twinmerge.json"),
]


@pytest.mark.few(4)
@pytest.mark.parametrize("folder, name", SPOILED)
@FUZZ
@given(seed=st.integers(0, 2**32))
def test_headers_and_tables_with_any_value_changed(lab: Any, folders: Any, folder: str, name: str, seed: int) -> None:
    """What opens after it answers: routed, and by a mixture of all experts."""
    batch = lab.case("bert", torch.float32).batch
    draw = random.Random(seed)

    def calls(twin: Twin) -> None:
        twin(**batch, mixture=dict.fromkeys(twin.experts, 0.3), head=twin.experts[0])
        if twin.router is not None:
            twin(**batch)

    with restored(folders[folder] / name) as file:
        if file.suffix == ".json":
            file.write_text(json.dumps(spoiled(json.loads(file.read_text()), draw)))
        else:
            with safe_open(file, "pt") as found:
                head = older(json.loads(found.metadata()["twinmerge"]))
            save_file(load_file(file), file, {"twinmerge": json.dumps(spoiled(head, draw))})
        opens_or_says_why(folders[folder], calls)


@pytest.mark.parametrize("folder, name", [("writers", "shared/config.json"), ("classifiers", "heads/e1/config.json")])
@FUZZ
@given(seed=st.integers(0, 2**32))
def test_configs_with_any_value_changed(folders: Any, folder: str, name: str, seed: int) -> None:
    with restored(folders[folder] / name) as file:
        file.write_text(json.dumps(spoiled(json.loads(file.read_text()), random.Random(seed))))
        opens_or_says_why(folders[folder], None)


@pytest.mark.parametrize("name", [TWIN, ROUTER, STATISTICS, "heads/e1/head.safetensors", "shared/model.safetensors"])
@FUZZ
@given(share=st.floats(0, 1, exclude_max=True), flip=st.booleans())
def test_files_cut_short_or_with_a_byte_of_the_header_changed(
    folders: Any, name: str, share: float, flip: bool
) -> None:
    with restored(folders["classifiers"] / name) as file:
        data = bytearray(file.read_bytes())
        if flip:
            header = 8 + int.from_bytes(data[:8], "little")
            data[int(share * header)] ^= 1 + int(share * 254)
            file.write_bytes(data)
            opens_or_says_why(folders["classifiers"], None)
        else:
            file.write_bytes(data[: int(share * len(data))])
            refused(folders["classifiers"], {})


@pytest.mark.parametrize("folder", ["classifiers", "small", "masks"])
@FUZZ
@given(seed=st.integers(0, 2**32))
def test_tensors_of_any_other_shape(lab: Any, folders: Any, folder: str, seed: int) -> None:
    draw = random.Random(seed)
    batch = lab.case("bert", torch.float32).batch

    def change(head: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        name = draw.choice(sorted(tensors))
        t = tensors[name]
        tensors[name] = draw.choice(
            [
                t[:-1],
                t[None],
                t.flatten()[:1],
                t[..., 1:],
                t.new_zeros(0),
                t.new_zeros(()),
                t.double(),
                t.to(torch.int16),
            ]
        ).contiguous()

    with restored(folders[folder] / TWIN) as file:
        artefact(file, change)
        opens_or_says_why(
            folders[folder], lambda twin: twin(**batch, mixture=dict.fromkeys(twin.experts, 0.3), head="e0")
        )
