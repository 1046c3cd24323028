"""What every method, router and codec must do, for the tests of other packages; ours are held to the same.

Each call goes through all checks of its kind, and what fails is an `AssertionError` that says what is wrong; no test
runner is needed. `METHOD_CHECKS`, `ROUTER_CHECKS` and `CODEC_CHECKS` are the same one by one, to be parametrized over.

Example:
    >>> check_method("task_arithmetic")
    >>> check_router("knn", neighbours=5)
    >>> check_codec("int8")
"""

from twinmerge.testing.codecs import CODEC_CHECKS as CODEC_CHECKS
from twinmerge.testing.codecs import check_codec as check_codec
from twinmerge.testing.methods import METHOD_CHECKS as METHOD_CHECKS
from twinmerge.testing.methods import check_method as check_method
from twinmerge.testing.routers import ROUTER_CHECKS as ROUTER_CHECKS
from twinmerge.testing.routers import check_router as check_router
