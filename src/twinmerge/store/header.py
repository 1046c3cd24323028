"""The header of a safetensors file: built as safetensors builds it, read more strictly than safetensors reads it."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from twinmerge.errors import DamagedFile, ModelError, ResourceError, TwinmergeError
from twinmerge.store.foreign import no_key_twice as no_key_twice
from twinmerge.store.foreign import open_regular
from twinmerge.store.foreign import shown as shown
from twinmerge.store.ranges import read_into

if TYPE_CHECKING:
    import torch

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""safetensors' code of a dtype -> torch's name of it."""
CODES = {name: code for code, name in DTYPES.items()}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
METADATA = "__metadata__"
MAX_HEADER = 25_000_000  # bytes; safetensors allows 100 million, which take ten seconds and 2 GB
MAX_TENSORS = 200_000  # of one file; the largest models have as many in a hundred
MAX_RANK = 64

# transformers gives a model that it dequantized back in the quantized format unless it is told not to.
CONVERT = (
    "import sys, transformers as t; folder, out = sys.argv[1:]; c = t.AutoConfig.from_pretrained(folder, "
    "trust_remote_code=False); "
    "q = getattr(c, 'quantization_config', None); q and q.update(dequantize=True); "
    "m = getattr(t, c.architectures[0]).from_pretrained(folder, config=c, dtype='bfloat16', trust_remote_code=False); "
    "m = m.dequantize() if getattr(m, 'is_quantized', False) else m; "
    "m.save_pretrained(out, save_original_format=not q)"
)

_SPACE = r"[ \t\n\r]*+"
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
# An object of nothing but strings (the metadata, of any length), or a flat one with room for a tensor's three fields.
# So what is handed to the JSON parser is small and cannot nest, whatever the file holds.
_ENTRY = re.compile(
    rf"{_SPACE}({_STRING}){_SPACE}:{_SPACE}(\{{(?:{_STRING}|[ \t\n\r:,])*+\}}|\{{[^{{}}]{{0,4096}}\}}){_SPACE}([,}}])",
    re.DOTALL,
)
_EMPTY = re.compile(rf"{_SPACE}\}}")


class _Spec(NamedTuple):
    code: str
    shape: tuple[int, ...]


class Spec(_Spec):
    """What a header says of one tensor; torch is imported only by who asks for its dtype.

    Args:
        dtype: safetensors' code, or a torch dtype.
        shape: of the tensor.

    Example:
        >>> spec = Spec("BF16", (2, 3))
        >>> spec.name, spec.bytes, spec.dtype, spec == Spec(spec.dtype, (2, 3))
        ('bfloat16', 12, torch.bfloat16, True)
    """

    __slots__ = ()

    def __new__(cls, dtype: str | torch.dtype, shape: tuple[int, ...]) -> Spec:
        return super().__new__(cls, dtype if isinstance(dtype, str) else code_of(dtype), shape)

    @property
    def name(self) -> str:
        """Of the dtype, as torch calls it."""
        return DTYPES[self.code]

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.code)

    @property
    def is_float(self) -> bool:
        return "F" in self.code

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return SIZES[self.code]

    @property
    def bytes(self) -> int:
        return self.numel * self.itemsize


def code_of(dtype: torch.dtype) -> str:
    """safetensors' code of a dtype.

    Raises:
        KeyError: a dtype that is not read or written here.
    """
    return CODES[str(dtype).removeprefix("torch.")]


def torch_dtype(code: str) -> torch.dtype:
    """The dtype of safetensors' code."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[code])
    return found


class Header(NamedTuple):
    """specs: by tensor name, in the order of the names; offsets: of each tensor's first byte in the file; metadata:
    the file's own."""

    specs: dict[str, Spec]
    offsets: dict[str, int]
    metadata: dict[str, str]


def header_of(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    """The header, length prefix included, of tensors that are laid out in the order of `specs`.

    Example:
        >>> header_of({"w": Spec("I8", (3,))}, {})[8:]
        b'{"__metadata__":{},"w":{"dtype":"I8","shape":[3],"data_offsets":[0,3]}} '
    """
    table: dict[str, object] = {METADATA: dict(metadata)}
    offset = 0
    for name, spec in specs.items():
        table[name] = {
            "dtype": spec.code,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.bytes],
        }
        offset += spec.bytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(fd: int, file: Path) -> Header:
    """Read and check the header of an open file; time and memory are bounded by its length, whatever it says.

    Stricter than safetensors: no key twice, no field besides dtype, shape and data_offsets, no space before the brace.

    Args:
        fd: of the whole file; nothing but the header is read.
        file: its path, for messages.

    Returns:
        The specs of all tensors, which fill the file to its end without hole or overlap.

    Raises:
        TwinmergeError: not a safetensors file, one of another length than it says, or a dtype that cannot be merged.
    """
    try:
        size = os.fstat(fd).st_size
        if size < 8:
            raise ValueError(f"its {size} bytes are too few")
        prefix = bytearray(8)
        read_into(fd, prefix, 0)
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER, size - 8):
            raise ValueError(f"it announces {length} bytes of header, at most {min(MAX_HEADER, size - 8)} can be there")
        raw = bytearray(length)
        read_into(fd, raw, 8)
        if (count := raw.count(b"{")) > MAX_TENSORS:
            raise ValueError(f"its header has {count} braces, for at most {MAX_TENSORS} tensors")
        return _parse(raw.decode(), 8 + length, size, file)
    except TwinmergeError:
        raise
    except (ValueError, EOFError, RecursionError) as error:
        raise DamagedFile(f"{file} is truncated or no safetensors file: {error}. Download or save it again.") from error
    except OSError as error:
        raise ResourceError(f"{file} cannot be read: {error.strerror}. Check the disk and read it again.") from error


def raw_header(file: Path) -> bytes:
    """The bytes of a file's header, length prefix included; `read_header` has found it to be one."""
    with open(open_regular(file), "rb") as content:
        prefix = content.read(8)
        return prefix + content.read(min(int.from_bytes(prefix, "little"), MAX_HEADER))


def _parse(text: str, start: int, size: int, file: Path) -> Header:
    """start: where the tensors' bytes begin in the file; size: of the file."""
    specs: dict[str, Spec] = {}
    spans: dict[str, tuple[int, int]] = {}
    metadata: dict[str, str] | None = None
    for name, value in _entries(text):
        if name in specs or (name == METADATA and metadata is not None):
            raise ValueError(f"the key {shown(name)} stands twice")
        if name == METADATA:
            if not all(isinstance(v, str) for v in value.values()):
                raise ValueError(f"its {METADATA} is {shown(value)}, expected strings")
            "".join((*value, *value.values())).encode()
            metadata = value
        else:
            specs[name], spans[name] = _tensor(name, value, file)
    end = 0
    for name in sorted(spans, key=spans.__getitem__):
        if spans[name][0] != end:
            raise ValueError(f"tensor {shown(name)} begins at byte {spans[name][0]} of the data, expected {end}")
        end = spans[name][1]
    if start + end != size:
        raise ValueError(f"its header speaks of {start + end} bytes, it has {size}")
    names = sorted(specs)
    return Header({n: specs[n] for n in names}, {n: start + spans[n][0] for n in names}, metadata or {})


def _entries(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not text.startswith("{"):
        raise ValueError("its header does not begin with a brace")
    at, comma = 1, ","
    if empty := _EMPTY.match(text, at):
        at, comma = empty.end(), "}"
    while comma == ",":
        if not (found := _ENTRY.match(text, at)):
            raise ValueError(f"at {shown(text[at : at + 60])} its header does not go on with a name and an object")
        name = _value(found[1])
        name.encode()
        yield name, _value(found[2])
        at, comma = found.end(), found[3]
    if rest := text[at:].strip(" \t\n\r"):
        raise ValueError(f"after its header stands {shown(rest[:60])}")


def _tensor(name: str, value: dict[str, Any], file: Path) -> tuple[Spec, tuple[int, int]]:
    if value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shown(name)} has {shown([*value])}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"tensor {shown(name)} has dtype {shown(dtype)}, expected a name")
    if dtype not in DTYPES:
        folder, out = shlex.quote(str(file.parent)), shlex.quote(f"./{file.absolute().parent.name}-bfloat16")
        raise ModelError(
            f"Tensor {shown(name)} in {file} has dtype {shown(dtype)[1:-1]}, which cannot be merged. Convert the model "
            "to "
            f'bfloat16 first: python -c "{CONVERT}" {folder} {out}'
        )
    # The product without zeros, so that torch's strides fit too.
    if not _is_counts(shape) or len(shape) > MAX_RANK or math.prod(n or 1 for n in shape) >= 2**63:
        raise ValueError(f"tensor {shown(name)} has shape {shown(shape)}, expected at most {MAX_RANK} sizes")
    spec = Spec(dtype, tuple(shape))
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != spec.bytes:
        raise ValueError(
            f"tensor {shown(name)} has data_offsets {shown(offsets)}, expected two that are {spec.bytes} bytes apart"
        )
    return spec, (offsets[0], offsets[1])


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)  # a bool is an int too


def _count(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError(f"the number {shown(digits)[1:-1]} is negative")  # -0 too: safetensors takes it for a float
    return int(digits)


def _value(text: str) -> Any:
    return _JSON.raw_decode(text)[0]  # `_ENTRY` has seen to it that nothing follows


_JSON = json.JSONDecoder(object_pairs_hook=no_key_twice, parse_int=_count)
