"""All experts in a share of the shared model's bytes, in two passes and in one."""

from __future__ import annotations

import json
import time
from functools import partial
from typing import Any

from kit.scores import row_of
from kit.texts import experts_on_their_own
from text_budget_parts.plan import FIRST, VALIDATION_ROWS, WEIGHED_BY, fit
from twinmerge.study.evaluate import TwinRunner, evaluate
from twinmerge.twin.compress import compressed
from twinmerge.twin.package import extra_bytes
from twinmerge.twin.reading import read_moments
from twinmerge.twin.twin import Twin

REFINED_BY = 2000  # rows of each expert

STEPS = 150  # of 16 rows

BUDGETS = (0.10, 0.04)

CODECS = ("int8", "int4")  # chosen on validation rows

SHARED: dict[str, dict[str, float]] = {"task_arithmetic": {"scale": 0.3}, "tsv": {"scale": 1.0}}

LAYERS = (1, 2)  # of single passes; chosen on validation rows


class Cut:
    """A twin of rank 64 that is cut to budgets; what its modules see of the experts' inputs is looked at once."""

    def __init__(self, whole: Twin, suite: Any, names: list[str]) -> None:
        self.whole = whole
        self.size = sum(spec.bytes for spec in whole.package.shared.specs.values())
        rows = {n: suite[n].rows("train", WEIGHED_BY) for n in names}
        self.moments = {n: read_moments(whole, given, n, 32, False) for n, given in rows.items()}

    def to(self, share: float, codec: str) -> Twin:
        package = self.whole.package_now()
        small = compressed(package, bytes=share * self.size, codec=codec, moments=self.moments)
        return Twin(small, self.whole.side_files)

    def share(self, twin: Twin) -> float:
        return extra_bytes(twin.package) / self.size


def budgets(base: str, experts: dict[str, str], suite: Any, names: list[str], heads: tuple[str, ...]) -> dict[str, Any]:
    reference = {
        s: experts_on_their_own(experts, suite, s, n) for s, n in (("validation", VALIDATION_ROWS), ("test", None))
    }
    tried: dict[str, float] = {}

    def on_validation(twin: Twin, what: str, reading: str | None = None) -> float:
        found = evaluate(TwinRunner(twin), suite, "validation", VALIDATION_ROWS, progress=False)
        tried[what] = next(e for e in found if e.reading == reading).normalised(reference["validation"])
        print(f"validation, {what}: {tried[what]:.2f}", flush=True)
        return tried[what]

    whole: dict[str, Cut] = {}
    for shared, parameters in SHARED.items():
        twin = Twin.build(base, experts, FIRST, shared=shared, heads=heads, progress=False, **parameters)
        whole[shared] = Cut(twin, suite, names)
    best = max(SHARED, key=lambda s: on_validation(whole[s].to(0.10, "int8"), f"{s}, 10 %, int8"))

    def coded(share: float, codec: str) -> float:
        return on_validation(whole[best].to(share, codec), f"{share:.0%}, {codec}")

    codecs = {share: max(CODECS, key=partial(coded, share)) for share in BUDGETS}
    passes: dict[int | None, Cut] = {None: whole[best]}
    passes |= {layer: Cut(whole[best].whole.single_pass(layer), suite, names) for layer in LAYERS}
    for layer, cut in passes.items():
        fit(cut.whole, suite, tuple(range(7 if layer is None else layer + 1)), names)
    single = max(
        LAYERS, key=lambda n: on_validation(passes[n].to(0.10, codecs[0.10]), f"single pass from layer {n}", "strict")
    )
    rows = []
    for share in BUDGETS:
        for layer, fine in ((None, False), (None, True), (single, True)):
            twin, seconds = passes[layer].to(share, codecs[share]), 0.0
            if fine:
                start = time.perf_counter()
                given = {n: suite[n].rows("train", REFINED_BY) for n in names}
                twin = twin.refine(given, experts=experts, steps=STEPS, progress=False)
                seconds = time.perf_counter() - start
            one = {
                "shared": best,
                "codec": codecs[share],
                "budget": share,
                "single_pass": layer,
                "refined": fine,
                "refine_seconds": seconds,
                "bytes": passes[layer].share(twin),
                "refused": twin.package.report["refused"] if twin.package.report else None,
            }
            found_test = [row_of(e, reference["test"]) for e in evaluate(TwinRunner(twin), suite, progress=False)]
            rows.append(one | {"settings": found_test})
            print(json.dumps(rows[-1], default=str)[:900], flush=True)
    return {"validation": tried, "rows": rows, "experts": reference["test"].scores}
