"""One combining rule in each file; what a rule of one's own is written with.

Example:
    >>> class Halfway(Method):
    ...     '''θ = θ0 + λ · mean of τt.'''
    ...
    ...     scale: float = 0.5
    ...
    ...     def apply(self, tile, known):
    ...         return tile.require_base() + self.scale * tile.x.mean(0)
    >>> Halfway().scale
    0.5

`twinmerge.merge(Halfway(scale=0.25), base, experts)` merges by it.
"""

from twinmerge.methods.kit.base import Known as Known
from twinmerge.methods.kit.base import Method as Method
from twinmerge.methods.kit.base import Partial as Partial
from twinmerge.methods.kit.base import Pass as Pass
from twinmerge.methods.kit.base import PerExpert as PerExpert
from twinmerge.methods.kit.base import Place as Place
from twinmerge.methods.kit.base import Scope as Scope
from twinmerge.methods.kit.base import Tile as Tile
from twinmerge.methods.kit.base import moved as moved
from twinmerge.methods.kit.base import per_expert as per_expert
from twinmerge.methods.kit.base import weighted_sum as weighted_sum
from twinmerge.methods.kit.dialect import Dialect as Dialect
from twinmerge.methods.kit.dialect import Number as Number
from twinmerge.methods.kit.dialect import Switch as Switch
