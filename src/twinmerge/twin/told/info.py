"""What a twin holds, in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from twinmerge.models.buffers import buffers_in
from twinmerge.results import Described, Table, megabytes, some
from twinmerge.twin.package import Package, extra_bytes


class _TwinInfo(NamedTuple):
    experts: list[str]
    shared: str | None
    codec: str
    bytes_extra: int
    retained: dict[str, float]
    router: dict[str, Any] | None
    router_kind: str | None
    rank: int
    heads: dict[str, list[str]]
    bytes_shared: int
    buffers: list[str]


class TwinInfo(Described, Table, _TwinInfo):
    """What a twin holds, in numbers; print it for all but the matrices. As a table: a row for each matrix.

    Attributes:
        experts: their names, in the order of a mixture's columns.
        shared: the static method of the shared part; None where it is not known.
        codec: of the numbers on the disk.
        bytes_extra: of the files beside the shared model: exclusive parts, heads, router.
        retained: matrix -> the share of Σt ‖vt‖² that the factors hold; empty for masks and refined parts.
        router: how it routed held-out rows, by `RouterReport`'s names; None where that was not measured.
        router_kind: such as "gaussian"; None where there is none.
        rank: the largest among the experts' matrices; 0 for masks.
        heads: expert -> the names of its labels, of those that have output layers of their own.
        bytes_shared: of the shared model's weights.
        buffers: running statistics, such as BatchNorm's, that experts have otherwise; all use the shared part's.
    """

    @classmethod
    def of(cls, package: Package, retained: dict[str, float]) -> TwinInfo:
        """What a package holds."""
        record = package.provenance.get("twin", {})
        shared = record.get("shared") or package.provenance.get("recipe", {}).get("merge_method")
        kind = None if package.router is None else package.router.kind
        bytes_extra = extra_bytes(package)
        buffers = buffers_in(package.provenance)
        heads = {name: head.labels for name, head in package.heads.items()}
        own = package.rank, heads, sum(spec.bytes for spec in package.shared.specs.values())
        return cls(
            list(package.exclusive), shared, package.codec, bytes_extra, retained, package.report, kind, *own, buffers
        )

    @property
    def kept(self) -> float | None:
        """The mean of `retained`; None where it is empty."""
        return sum(self.retained.values()) / len(self.retained) if self.retained else None

    def _summary(self) -> str:
        kept = "" if self.kept is None else f", {100 * self.kept:.1f} % kept"
        router = self.router_kind or "no"
        return f"{some(self.experts)} on {self.shared}, {router} router, {self.bytes_extra / 1e6:.1f} MB extra{kept}"

    def _about(self) -> dict[str, str]:
        """What it holds, without the matrices."""
        found = {"experts": ", ".join(self.experts), "shared part": self.shared or "not known"}
        kept = "" if self.kept is None else f", {100 * self.kept:.1f} % of a matrix's energy kept"
        found["rank"] = f"{self.rank or 'none'}, codec {self.codec}{kept}"
        found["bytes"] = f"{megabytes(self.bytes_extra)} beside {megabytes(self.bytes_shared)} of the shared model"
        found["router"] = self.router_kind or "none: name the expert or the mixture in each call"
        if self.router is not None:
            right = ", ".join(f"{name} {100 * share:.1f}" for name, share in self.router["right_by_expert"].items())
            found["routed right"] = (
                f"{100 * self.router['right']:.1f} % of {self.router['rows']} held-out rows ({right})"
            )
            found["refused"] = self._refused(self.router)
        elif self.router_kind is not None:
            found["routed right"] = "not measured of these experts"
        found["heads"] = "; ".join(f"{name}: {_labels(labels)}" for name, labels in self.heads.items()) or "none"
        if self.buffers:
            found["shared statistics"] = f"{some(self.buffers)} ({len(self.buffers)}): each expert's own are left out"
        return found

    def _refused(self, report: Mapping[str, Any]) -> str:
        """What the router leaves to the shared model."""
        if "refuse" not in report:  # of a release that did not tell
            return f"{100 * report.get('refused', 0.0):.1f} % of them"
        if not report["refuse"]:
            return "never: refuse=0"
        lacking = report["unlimited"]
        if len(lacking) == len(self.experts):
            return f"never: too few inputs for refuse={report['refuse']:g}"
        more = f"; none that is nearest to {some(lacking)}, of too few inputs" if lacking else ""
        return f"{100 * report['refused']:.1f} % of them, at most {100 * report['refuse']:g} % in expectation{more}"

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        return ("matrix", "retained"), list(self.retained.items())


def _labels(names: Sequence[str]) -> str:
    """The first names of labels, and how many there are."""
    return f"{', '.join(names[:4])}{f', … ({len(names)})' if len(names) > 4 else ''}" or "no names"
