"""Which table of a donor tells of the tokens in which table of a model: that of the same use."""

from __future__ import annotations

from collections.abc import Mapping

from twinmerge.engine.tokens.apply import CODES
from twinmerge.engine.transplant.fill import DonorTable
from twinmerge.errors import ModelError
from twinmerge.models.opened import OpenedModel


def width_of(model: OpenedModel, name: str, rows: int) -> int:
    """Elements of a row of a table.

    Raises:
        ModelError: numbers that are no plain floats.
    """
    spec = model.spec(name)
    if model.range_code(name) not in CODES:
        raise ModelError(
            f"Tensor {name!r} of {model.name} is of {spec.name}, and rows are made in 16 bits or more. Restore it in "
            "bfloat16 or float32."
        )
    return spec.numel // rows


def leading(model: OpenedModel, tables: Mapping[str, int]) -> dict[str, str]:
    """Table -> the one whose rows say how its own are made: a matrix by itself, a bias by the output layer's, or, where
    that is tied, the embedding's.

    Args:
        model: that has them.
        tables: name -> rows.

    Raises:
        ModelError: a bias, and several matrices that it may belong to.
    """
    matrices = [name for name, rows in tables.items() if width_of(model, name, rows) > 1]
    outputs = [name for name in matrices if not model.table(name)] or matrices
    found = {}
    for name in tables:
        if name not in matrices and len(outputs) != 1:
            raise ModelError(
                f"Tensor {name!r} of {model.name} has a number for each token, and it is not known which of "
                f"{', '.join(outputs) or 'its tables'} it goes with. No vocabulary is transplanted into it."
            )
        found[name] = name if name in matrices else outputs[0]
    return found


def donor_table(name: str, model: OpenedModel, donor: OpenedModel, tables: Mapping[str, int]) -> DonorTable:
    """The donor's table of the same use: an embedding for an embedding, an output layer for one; its embedding where
    that is tied.

    Args:
        name: of the model's.
        model, donor: both.
        tables: the donor's, name -> rows.

    Raises:
        ModelError: several, none of which has the same name.
    """
    matrices = [each for each, rows in tables.items() if width_of(donor, each, rows) > 1]
    alike = [each for each in matrices if donor.table(each) == model.table(name)] or matrices
    if len(alike) > 1 and name in alike:
        alike = [name]
    if len(alike) != 1:
        raise ModelError(
            f"{donor.name} has {', '.join(alike) or 'no table'}, and it is not known which of them tells of the tokens in "
            f"{name!r} of {model.name}. Take --method subtokens, which looks at none."
        )
    return DonorTable(donor, alike[0], tables[alike[0]], width_of(donor, alike[0], tables[alike[0]]))
