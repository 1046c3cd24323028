"""What does not fit a state is refused in a sentence, and the state's bytes stay as they are."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2Model

from twinmerge.continual.continual import Continual
from twinmerge.continual.folds import fold_names, fold_of
from twinmerge.errors import TwinmergeError

DENSE = "encoder.layer.0.output.dense.weight"


@pytest.fixture
def state(started):
    return started("iso_c", "ab")


@pytest.fixture
def unchanged(state):
    """unchanged(match, attempt): the attempt is refused and leaves the folder as it was."""

    def check(match, attempt):
        before = {x.relative_to(state.folder): x.read_bytes() for x in state.folder.rglob("*") if x.is_file()}
        with pytest.raises(TwinmergeError, match=match):
            attempt()
        assert {x.relative_to(state.folder): x.read_bytes() for x in state.folder.rglob("*") if x.is_file()} == before

    return check


@pytest.fixture
def edited(zoo, tmp_path):
    """edited("c", change) -> a copy of the model whose tensors were changed."""

    def make(name, change):
        folder = shutil.copytree(zoo.paths[name], tmp_path / f"{name}-edited")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    return make


# --------------------------------------------------------------------------------------- the expert


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tensor", [DENSE, "pooler.dense.bias"])
def test_a_number_that_is_not_finite_is_named_with_its_place(zoo, state, unchanged, edited, tensor, bad):
    path = edited("c", lambda tensors: tensors[tensor].view(-1)[3].fill_(bad))
    unchanged(f"'{tensor}' of the expert 'c' holds NaN or infinity", lambda: state.add("c", path))
    state.add("c", zoo.paths["c"])


@pytest.mark.parametrize("method", fold_names())
def test_nor_as_the_first_expert_of_any_method(started, edited, method):
    path = edited("c", lambda tensors: tensors[DENSE].view(-1)[3].fill_(float("nan")))
    state = started(method)
    before = (state.folder / "state.safetensors").read_bytes()
    with pytest.raises(TwinmergeError, match=f"'{DENSE}' of the expert 'c' holds NaN"):
        state.add("c", path)
    assert (state.folder / "state.safetensors").read_bytes() == before


def test_a_classifier_that_is_refused_leaves_no_head(state, unchanged, edited):
    def spoil(tensors):
        tensors[f"bert.{DENSE}"][0, 0] = float("nan")

    path = edited("mood", spoil)
    unchanged("holds NaN", lambda: state.add("mood", path))
    assert state.heads() == {} and state.status()["heads_bytes"] == 0


def test_an_expert_of_another_base(state, unchanged, make_base):
    torch.manual_seed(99)
    other = make_base()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(std=0.3)
    unchanged("c does not come from the base", lambda: state.add("c", other))


def test_an_expert_of_another_architecture(state, unchanged, tmp_path):
    GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=16)).save_pretrained(
        tmp_path / "gpt"
    )
    unchanged("is a gpt2 model, the base .* is a bert", lambda: state.add("c", str(tmp_path / "gpt")))


def test_a_tensor_that_is_missing(state, unchanged, edited):
    path = edited("c", lambda tensors: tensors.pop(DENSE))
    unchanged(f"lacks the tensor '{DENSE}'", lambda: state.add("c", path))


def test_a_vocabulary_of_another_size(state, unchanged, make_base):
    unchanged("vocab|word_embeddings", lambda: state.add("c", make_base(vocab_size=31)))


def test_an_expert_that_keeps_for_itself_what_the_others_merged(zoo, state, unchanged, tmp_path):
    """A pooler that the base has and the expert has not."""
    from transformers import BertModel

    BertModel.from_pretrained(zoo.paths["c"], add_pooling_layer=False).save_pretrained(tmp_path / "bare")
    unchanged("pooler.dense", lambda: state.add("c", str(tmp_path / "bare")))


@pytest.mark.parametrize("path", ["no/such/folder/here", ""])
def test_an_expert_that_is_not_there(state, unchanged, path):
    unchanged("No model at|is empty", lambda: state.add("c", path))


@pytest.mark.parametrize("name", ["", "../c", "c/d", "base", "output", ".hidden", "with space", "c\n", "-c"])
def test_a_name_that_is_no_folder(zoo, state, unchanged, name):
    unchanged("is not usable", lambda: state.add(name, zoo.paths["c"]))
    assert {x.name for x in state.folder.iterdir()} == {"state.safetensors"}


def test_a_name_that_is_taken(zoo, state, unchanged):
    unchanged("has an expert 'a' already", lambda: state.add("a", zoo.paths["c"]))


def test_an_expert_in_memory_that_is_to_leave_must_be_given(zoo, started, state):
    state.add("c", zoo.models["c"])
    with pytest.raises(TwinmergeError, match="No model at 'c'"):
        state.remove("c")
    state.remove("c", zoo.models["c"])
    assert state.about.names == ("a", "b")


def test_numbers_beyond_the_states_dtype(started, edited):
    """A few of float32's largest add up to more than it holds; float64 holds them."""
    path = edited("c", lambda tensors: tensors["pooler.dense.bias"].fill_(3e38))
    other = edited("d", lambda tensors: tensors["pooler.dense.bias"].fill_(3e38))
    wide, narrow = (started("task_arithmetic", "", dtype, dtype=dtype, scale=0.1) for dtype in ("float64", "float32"))
    for state in (wide, narrow):
        state.add("c", path)
    wide.add("d", other)
    before = (narrow.folder / "state.safetensors").read_bytes()
    with pytest.raises(TwinmergeError, match="'pooler.dense.bias' of the state would not fit float32.*float64"):
        narrow.add("d", other)
    assert (narrow.folder / "state.safetensors").read_bytes() == before


# ----------------------------------------------------------------------------------- the new state


@pytest.mark.parametrize("method", ["tsv", "ties", "iso_cts", "knots", "emr", "fisher"])
def test_a_method_that_needs_all_experts_at_once(zoo, tmp_path, method):
    with pytest.raises(TwinmergeError, match=f"{method} needs all experts at once. Choose from average,"):
        Continual.init(tmp_path / "state", zoo.base, method)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "method, parameters, match",
    [
        ("iso_d", {}, "iso_c"),
        ("opcm", {"alfa": 0.5}, "alpha"),
        ("opcm", {"alpha": 2.0}, "alpha"),
        ("iso_c", {"calibration": 0.1}, "calibration has no place"),
        ("average", {"weights": 0.5}, "weights has no place"),
        ("null_space", {"rank": 0}, "rank"),
    ],
)
def test_parameters_that_do_not_go(zoo, tmp_path, method, parameters, match):
    with pytest.raises(TwinmergeError, match=match):
        Continual.init(tmp_path / "state", zoo.base, method, **parameters)
    assert not (tmp_path / "state").exists()


def test_neutral_weights_go():
    assert fold_of("average", {"weights": 1.0}).weights == 1.0


@pytest.mark.parametrize("dtype", ["float16", "int8", "double"])
def test_a_dtype_that_keeps_too_little(zoo, tmp_path, dtype):
    with pytest.raises(TwinmergeError, match=f"float64 or float32, not '{dtype}'"):
        Continual.init(tmp_path / "state", zoo.base, "iso_c", dtype=dtype)


def test_a_folder_that_is_in_use(zoo, state, unchanged):
    unchanged("is there already and not empty", lambda: Continual.init(state.folder, zoo.base, "iso_c"))


def test_a_base_that_is_not_there(tmp_path):
    with pytest.raises(TwinmergeError, match="No model at"):
        Continual.init(tmp_path / "state", "no/such/folder/here")
    assert not (tmp_path / "state").exists()


def test_an_output_dtype_that_there_is_not(state, tmp_path):
    with pytest.raises(TwinmergeError, match="Cannot write dtype 'float31'.*float32"):
        state.materialise(tmp_path / "out", "float31")
    assert not (tmp_path / "out").exists()


def test_numbers_beyond_the_outputs_dtype(started, edited, tmp_path):
    state = started("average", ["a"])
    state.add("c", edited("c", lambda tensors: tensors["pooler.dense.bias"].fill_(1e30)))
    with pytest.raises(TwinmergeError, match="'pooler.dense.bias' does not fit torch.float16"):
        state.materialise(tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    state.materialise(tmp_path / "out", "bfloat16")


def test_an_empty_state_has_no_model(started, tmp_path):
    with pytest.raises(TwinmergeError, match="has no expert yet"):
        started("iso_c").materialise(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------- the base


def test_a_base_that_moved_is_named_with_base(zoo, tmp_path):
    home = shutil.copytree(zoo.base, tmp_path / "home")
    state = Continual.init(tmp_path / "state", str(home), "iso_c", progress=False)
    state.add("a", zoo.paths["a"])
    want = state.canonical_state()
    home.rename(tmp_path / "elsewhere")
    for attempt in (lambda s: s.add("b", zoo.paths["b"]), lambda s: s.canonical_state()):
        with pytest.raises(TwinmergeError, match="The base of the state cannot be read: No model at .*--base"):
            attempt(Continual(tmp_path / "state", progress=False))
    moved = Continual(tmp_path / "state", str(tmp_path / "elsewhere"), progress=False)
    got = moved.canonical_state()
    assert all(torch.equal(got[name], value) for name, value in want.items())
    moved.add("b", zoo.paths["b"])
    assert Continual(tmp_path / "state", zoo.models["base"]).about.names == ("a", "b")


def test_another_base_is_refused(zoo, state, unchanged):
    other = Continual(state.folder, zoo.paths["c"], progress=False)
    match = "is not the base that the state .* was made for"
    unchanged(match, lambda: other.add("d", zoo.paths["d"]))
    unchanged(match, other.canonical_state)


def test_a_base_that_changed_is_refused(zoo, tmp_path):
    home = shutil.copytree(zoo.base, tmp_path / "home")
    state = Continual.init(tmp_path / "state", str(home), "opcm", progress=False)
    state.add("a", zoo.paths["a"])
    tensors = load_file(home / "model.safetensors")
    tensors[DENSE][0, 0] += 0.5
    save_file(tensors, home / "model.safetensors", {"format": "pt"})
    with pytest.raises(TwinmergeError, match="is not the base"):
        Continual(tmp_path / "state", progress=False).add("b", zoo.paths["b"])
    with pytest.raises(TwinmergeError, match="is not the base"):
        Continual(tmp_path / "state", progress=False).materialise(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_finite_is_named(zoo, edited, tmp_path):
    base = edited("base", lambda tensors: tensors[DENSE][0].fill_(float("inf")))
    state = Continual.init(tmp_path / "state", base, "iso_c", progress=False)
    with pytest.raises(TwinmergeError, match=f"'{DENSE}' of the base {base} holds NaN or infinity"):
        state.add("a", zoo.paths["a"])
