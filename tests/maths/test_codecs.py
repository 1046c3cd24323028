"""What every codec must do; a new file in maths/codecs/ is tested by being there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from twinmerge.errors import TwinmergeError
from twinmerge.maths import codec as codecs
from twinmerge.maths.codec import TINY, Codec, codec_names, codec_of, decode, encode, pack, projected, unpack
from twinmerge.maths.codecs.kit.sound import STORED
from twinmerge.store.header import CODES
from twinmerge.testing import CODEC_CHECKS
from twinmerge.testing.codecs import opened

NAMES = codec_names()[1:]
SHAPES = [(1, 1), (3, 1), (1, 5), (2, 63), (5, 64), (4, 65), (2, 130), (64, 3), (3, 2, 5), (2, 3, 2, 4)]
EDGES = [0.0, -0.0, 1e-45, -1e-40, 2.0**-126, -(2.0**-24), 0.5, -1.0, 1.0, 65504.0, -65504.0]


def rows_of(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.movedim(dim, 0).reshape(x.shape[dim], -1)


def check(name: str, x: torch.Tensor, dim: int) -> None:
    """The bytes are as many as the codec says, no number is off by more than it says, and what is read encodes to
    the same bytes."""
    codec = codec_of(name)
    stored, scales = encode(x, name, dim)
    slices, length = rows_of(x, dim).shape
    whole = slices * codec.slice_bytes(length) if codec.sliced else codec.slice_bytes(x.numel())
    assert stored.nbytes + (0 if scales is None else scales.nbytes) == whole
    assert (scales is not None) == codec.sliced and (codec.packs or stored.shape == x.shape)
    again = decode(stored, scales, name, dim, x.shape)
    assert again.dtype == torch.float32 and again.shape == x.shape and bool(again.isfinite().all())
    rows = rows_of(x, dim)
    assert bool(((rows - rows_of(again, dim)).abs() <= codec.bound(rows)).all())
    twice, same = encode(again, name, dim)
    assert torch.equal(twice, stored) and (scales is same is None or torch.equal(same, scales))
    assert torch.equal(projected(x, name, dim), again)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_shape_along_any_axis(name, shape):
    for seed, dim in enumerate(range(len(shape))):
        generator = torch.Generator().manual_seed(seed)
        for size in (1e-30, 1e-6, 1.0, 1e3):
            x = size * torch.randn(shape, generator=generator)
            check(name, x, dim)
            check(name, x.mT, len(shape) - 1 - dim if dim > len(shape) - 3 else dim)  # not contiguous


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70).flatmap(
        lambda n: st.lists(st.lists(st.sampled_from(EDGES), min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    dim=st.integers(0, 1),
)
def test_numbers_at_the_edges(name, rows, dim):
    check(name, torch.tensor(rows), dim)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", CODEC_CHECKS, ids=lambda check: check.__name__.strip("_"))
def test_every_codec(check, name):
    check(opened(name))


@pytest.mark.parametrize(
    "shape, dim", [((0, 3), 0), ((2, 0), 0), ((2, 0), 1), ((0,), None), ((), None), ((7,), None)], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_at_all_and_what_has_no_slices(name, shape, dim):
    x = torch.ones(shape)
    stored, scales = encode(x, name, dim)
    assert scales is None and stored.shape == x.shape and stored.nbytes <= x.nbytes
    again = decode(stored, scales, name, dim, x.shape)
    assert again.dtype == torch.float32 and torch.equal(again, x)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_a_file_give_the_projection(name):
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "b": torch.randn(70, 3, generator=generator),
        "a": torch.randn(3, 65, generator=generator),
        "bias": torch.randn(9, generator=generator),
        "none": torch.empty(0, 4),
    }
    dims = {"b": 1, "a": 0, "none": 0}
    stored, header = pack(tensors, name, dims)
    assert header["codec"] == name and ("shapes" in header) is codec_of(name).packs
    found = unpack(load(save(stored)), header)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], projected(x, name, dims.get(n))) for n, x in tensors.items())
    again, same = pack(found, name, dims)
    assert same == header and save(again) == save(stored)


# --------------------------------------------------------------------------------------- other packages


class Thirds(Codec):
    """Whole thirds of the largest number, in eight bits."""

    def encode(self, rows):
        scales = codecs.rounded_up(rows.abs().amax(1) / 3, 8)
        return (rows / codecs.divisor(scales)[:, None]).round().to(torch.int8), scales

    def decode(self, stored, scales, length):
        return stored.float() * scales[:, None]

    def slice_bytes(self, length):
        return length + 4

    def bound(self, rows):
        return (rows.abs().amax(1, keepdim=True) / 5.9 + TINY).expand_as(rows)


class Unslicing(Thirds):
    sliced, packs = False, True


class Vague(Thirds):
    packs = "yes"


class Bare(Codec):
    def encode(self, rows):
        return rows, None


@pytest.fixture
def offered(monkeypatch):
    kinds = {"thirds": Thirds, "vague": Vague, "bare": Bare, "unslicing": Unslicing, "three": 3, "int8": Thirds}
    found = [SimpleNamespace(name=n, value=f"package:{n}", load=lambda kind=kind: kind) for n, kind in kinds.items()]
    groups = {"twinmerge.codecs": found}
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: groups.get(group, []))
    codec_of.cache_clear()
    yield
    codec_of.cache_clear()


@pytest.mark.usefixtures("offered")
def test_a_codec_of_another_package():
    assert codec_names()[-1] == "vague" and codec_names().count("int8") == 1
    check("thirds", torch.randn(4, 9, generator=torch.Generator().manual_seed(0)), 0)
    x = {"w": torch.tensor([[3.0, -1.1], [0.0, 0.0]])}
    stored, header = pack(x, "thirds", {"w": 0})
    assert header["codec"] == "thirds" and unpack(stored, header)["w"].tolist() == [[3.0, -1.0], [0.0, 0.0]]
    assert type(codec_of("int8")).__module__ == "twinmerge.maths.codecs.int8"


@pytest.mark.usefixtures("offered")
@pytest.mark.parametrize(
    "name, message",
    [
        ("vague", "^vague: packs is 'yes'. Write True or False"),
        ("unslicing", "^unslicing packs numbers, and has no slices to pack them in"),
        ("bare", "^bare is no codec yet: Bare does not define bound, decode, slice_bytes. Define it"),
        ("three", "^three is no codec: 3 does not derive from Codec"),
        ("third", "^Unknown codec 'third'. Did you mean 'thirds'. Choose from none, "),
    ],
)
def test_a_codec_that_lacks_something_is_named_at_its_first_use(name, message):
    with pytest.raises(TwinmergeError, match=message):
        encode(torch.ones(1, 1), name, 0)


def eighths(rows):
    """Stored right, in eight bits."""
    scales = codecs.rounded_up(rows.abs().amax(1) / 127, 16)
    return (rows / codecs.divisor(scales)[:, None]).round().to(torch.int8), scales


def jittered(rows):
    stored, scales = eighths(rows)
    return stored + torch.randint_like(stored, -1, 2).where(stored.abs() < 100, 0), scales


def in_place(rows):
    stored, scales = eighths(rows)
    rows.zero_()
    return stored, scales


WRONG = {
    "float64": (
        {"decode": lambda self, s, c, n: s.double() * c[:, None]},
        "decode gives torch.float64, not torch.float32",
    ),
    "levels": ({"decode": lambda self, s, c, n: s}, "decode gives torch.int8"),
    "no scales": ({"decode": lambda self, s, c, n: s.float()}, "numbers are off by more than bound says"),
    "transposed": ({"decode": lambda self, s, c, n: (s.float() * c[:, None]).T}, r"decode gives \(70, 250\), not"),
    "short": ({"decode": lambda self, s, c, n: (s.float() * c[:, None])[:, 1:]}, r"decode gives \(250, 69\), not"),
    "NaN": ({"decode": lambda self, s, c, n: s.float() * torch.nan}, "decode gives NaN or infinity"),
    "shrinks": (
        {"decode": lambda self, s, c, n: 0.9 * s.float() * c[:, None], "bound": lambda self, r: r.abs() + TINY},
        "what is read encodes to other bytes",
    ),
    "fails": ({"decode": lambda self, s, c, n: {}["x"]}, "decode fails: KeyError: 'x'"),
    "refuses": (
        {"decode": lambda self, s, c, n: [][:0].index(1)},
        "decode refuses what encode stored: ValueError",
    ),
    "one value": ({"encode": lambda self, r: eighths(r)[0]}, "encode gives Tensor, not what is stored and its scales"),
    "no scale": ({"encode": lambda self, r: (eighths(r)[0], None)}, "encode gives no scales, and sliced is True"),
    "one scale": (
        {"encode": lambda self, r: (eighths(r)[0], r.max())},
        r"encode gives scales of shape \(\) for 250 slices",
    ),
    "some slices": ({"encode": lambda self, r: (eighths(r)[0][:1], eighths(r)[1])}, r"encode stores \(1, 70\)"),
    "packs": ({"encode": lambda self, r: (eighths(r)[0].repeat(1, 2), eighths(r)[1])}, r"encode stores \(250, 140\)"),
    "jittered": ({"encode": lambda self, r: jittered(r)}, "the same numbers are not stored, or read, alike each time"),
    "complex": (
        {
            "encode": lambda self, r: (eighths(r)[0].to(torch.complex64), eighths(r)[1]),
            "slice_bytes": lambda self, n: 8 * n + 4,
        },
        "encode gives complex64, which our files do not hold",
    ),
    "bytes": ({"slice_bytes": lambda self, n: 1}, "encode stores 18500 bytes, and slice_bytes says 250"),
    "half bytes": ({"slice_bytes": lambda self, n: n / 2}, "slice_bytes gives 35.0, not a whole number of bytes"),
    "bound": ({"bound": lambda self, r: 0 * r}, "numbers are off by more than bound says"),
    "bound's shape": ({"bound": lambda self, r: r.abs().amax()}, "bound gives no tensor of the shape of its rows"),
    "arguments": ({"__init__": lambda self, bits: None}, "cannot be made without arguments: TypeError"),
}
NAMED = {
    "decode": (
        {"decode": lambda self, s, c: s},
        r"^own: decode takes other arguments. Write def decode\(self, stored, ",
    ),
    "encode": (
        {"encode": lambda self, r, dim: r},
        r"^own: encode takes other arguments. Write def encode\(self, rows\)",
    ),
    "slice": ({"slice": False}, "^own: slice is no attribute of a codec. Did you mean 'sliced'"),
    "pack": ({"pack": True}, "^own: pack is no attribute of a codec. Did you mean 'packs'"),
}


@pytest.fixture
def stored_by(monkeypatch):
    """What a codec of another package, with another body, stores of a matrix."""

    def store(**body):
        right = {
            "encode": lambda self, rows: eighths(rows),
            "decode": lambda self, stored, scales, length: stored.float() * scales[:, None],
            "slice_bytes": lambda self, length: length + 4,
            "bound": lambda self, rows: (rows.abs().amax(1, keepdim=True) / 250 + TINY).expand_as(rows),
        }
        own = type("Own", (Codec,), {"__module__": __name__, **right, **body})
        entry = SimpleNamespace(name="own", value="package:Own", load=lambda: own)
        groups = {"twinmerge.codecs": [entry]}
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: groups.get(group, []))
        codec_of.cache_clear()
        return pack({"w": torch.ones(2, 3)}, "own", {"w": 0})

    yield store
    codec_of.cache_clear()


def test_what_may_be_stored_is_what_files_hold():
    assert set(STORED) == CODES.keys()


def test_one_that_is_right_is_taken(stored_by):
    stored, header = stored_by()
    assert torch.allclose(unpack(stored, header)["w"], torch.ones(2, 3), atol=1e-4)


@pytest.mark.parametrize("kind", WRONG)
def test_one_that_is_broken_is_named_before_it_stores_anything(stored_by, kind):
    body, message = WRONG[kind]
    with pytest.raises(TwinmergeError, match=f"^The codec own is broken: {message}.*Mend it, or choose another codec"):
        stored_by(**body)


@pytest.mark.parametrize("kind", NAMED)
def test_typing_errors_of_a_class_are_named(stored_by, kind):
    body, message = NAMED[kind]
    with pytest.raises(TwinmergeError, match=message):
        stored_by(**body)


def test_one_that_works_in_place_gets_copies(stored_by):
    x = torch.tensor([[3.0, -1.0], [0.5, 0.0]])
    stored_by(encode=lambda self, rows: in_place(rows), decode=lambda self, s, c, n: s.float().mul_(c[:, None]))
    stored, scales = encode(x, "own", 0)
    assert x.tolist() == [[3.0, -1.0], [0.5, 0.0]]
    kept = stored.clone(), scales.clone()
    decode(stored, scales, "own", 0)
    assert torch.equal(stored, kept[0]) and torch.equal(scales, kept[1])


def test_damage_that_a_codec_finds_stays_a_value_error(stored_by):
    """The file's reader says the sentence."""

    def refusing(self, stored, scales, length):
        if len(scales) != len(stored):
            raise ValueError("scales")
        return stored.float() * scales[:, None]

    stored, header = stored_by(decode=refusing)
    with pytest.raises(ValueError, match="^scales$"):
        unpack({**stored, "w#scale": stored["w#scale"][:1]}, header)


def test_a_file_whose_codec_is_gone_with_its_package():
    with pytest.raises(
        TwinmergeError, match="by the codec 'thirds', which neither .* Install the package that offers it"
    ):
        unpack({"w": torch.ones(1)}, {"codec": "thirds", "dims": {}})
