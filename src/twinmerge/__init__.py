"""twinmerge: many fine-tuned models of one base become one model, static or mixed anew for every input.

Everything that the command does has a call of the same name here (`docs/python.md` has the table). One rule holds for
all:

- With `out` a call does its work at once and writes it there, whole or not at all; nothing is written anywhere else.
- Without `out` nothing is written, and what the call gives is all there is. `merge` and `Twin` then describe or hold a
  model, which is written when you say so: `.save(out)`, `.save_pretrained(out)`.

What a call gives prints as one line, shows as a table in a notebook, and is plain data by `to_dict()`, as the
command's `--json` prints it; tables also have `to_pandas()`, `to_csv()` and `to_latex()`.

The names below load what they need when they are first used, so that `import twinmerge` is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twinmerge.moved import old_name, serve_old_names
from twinmerge.registration import register_with_transformers

serve_old_names()
register_with_transformers()
__version__: str

_WHERE = {
    "Continual": "continual.continual",
    "DamagedFile": "errors",
    "DataError": "errors",
    "Merge": "engine.merge",
    "ModelError": "errors",
    "OutputError": "errors",
    "Prediction": "twin.predict",
    "Recipe": "recipes.recipe",
    "RecipeError": "errors",
    "ResourceError": "errors",
    "TorchModel": "models.torch_module",
    "Twin": "twin.twin",
    "TwinOutput": "twin.call",
    "TwinmergeError": "errors",
    "UsageError": "errors",
    "add_statistics": "statistics.measure",
    "build_masks": "study.masks",
    "check": "engine.calls",
    "demo": "study.demo",
    "diff": "engine.diff",
    "evaluate": "study.evaluate",
    "explain_recipe": "engine.explain",
    "extract_lora": "engine.adapters.extract",
    "extract_masked": "twin.masks.extract",
    "list_codecs": "maths.codec",
    "list_methods": "methods.kit.listing",
    "list_routers": "twin.routers.kit.listing",
    "load": "engine.load",
    "measure": "statistics.measure",
    "merge": "engine.calls",
    "merge_checkpoints": "engine.checkpoints",
    "merge_lora": "engine.adapters.merge",
    "open_suite": "tasks.suite",
    "push": "engine.push",
    "read_inputs": "tasks.rows",
    "read_recipe": "recipes.documents",
    "recipe_template": "recipes.template",
    "search": "study.search",
    "smoke_check": "study.smoke",
    "transplant": "engine.transplant.transplant",
    "verify": "engine.verify",
    "zero_shot": "engine.zero_shot",
}
__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from twinmerge.continual.continual import Continual as Continual
    from twinmerge.engine.adapters.extract import extract_lora as extract_lora
    from twinmerge.engine.adapters.merge import merge_lora as merge_lora
    from twinmerge.engine.calls import check as check
    from twinmerge.engine.calls import merge as merge
    from twinmerge.engine.checkpoints import merge_checkpoints as merge_checkpoints
    from twinmerge.engine.diff import diff as diff
    from twinmerge.engine.explain import explain_recipe as explain_recipe
    from twinmerge.engine.load import load as load
    from twinmerge.engine.merge import Merge as Merge
    from twinmerge.engine.push import push as push
    from twinmerge.engine.transplant.transplant import transplant as transplant
    from twinmerge.engine.verify import verify as verify
    from twinmerge.engine.zero_shot import zero_shot as zero_shot
    from twinmerge.errors import DamagedFile as DamagedFile
    from twinmerge.errors import DataError as DataError
    from twinmerge.errors import ModelError as ModelError
    from twinmerge.errors import OutputError as OutputError
    from twinmerge.errors import RecipeError as RecipeError
    from twinmerge.errors import ResourceError as ResourceError
    from twinmerge.errors import TwinmergeError as TwinmergeError
    from twinmerge.errors import UsageError as UsageError
    from twinmerge.maths.codec import list_codecs as list_codecs
    from twinmerge.methods.kit.listing import list_methods as list_methods
    from twinmerge.models.torch_module import TorchModel as TorchModel
    from twinmerge.recipes.documents import read_recipe as read_recipe
    from twinmerge.recipes.recipe import Recipe as Recipe
    from twinmerge.recipes.template import recipe_template as recipe_template
    from twinmerge.statistics.measure import add_statistics as add_statistics
    from twinmerge.statistics.measure import measure as measure
    from twinmerge.study.demo import demo as demo
    from twinmerge.study.evaluate import evaluate as evaluate
    from twinmerge.study.masks import build_masks as build_masks
    from twinmerge.study.search import search as search
    from twinmerge.study.smoke import smoke_check as smoke_check
    from twinmerge.tasks.rows import read_inputs as read_inputs
    from twinmerge.tasks.suite import open_suite as open_suite
    from twinmerge.twin.call import TwinOutput as TwinOutput
    from twinmerge.twin.masks.extract import extract_masked as extract_masked
    from twinmerge.twin.predict import Prediction as Prediction
    from twinmerge.twin.routers.kit.listing import list_routers as list_routers
    from twinmerge.twin.twin import Twin as Twin


def __getattr__(name: str) -> Any:
    if name == "__version__":  # of what is installed: pyproject.toml alone names it
        from importlib.metadata import version

        return version("twinmerge")
    if name not in _WHERE:
        return old_name(__name__, name, __all__)
    from importlib import import_module

    return getattr(import_module(f"twinmerge.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
