"""twinmerge: many fine-tuned models of one base become one model, static or mixed anew for every input.

The names below load what they need when they are first used, so that `import twinmerge` is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twinmerge.moved import serve_old_names

serve_old_names()
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
    "compress": "twin.masks.build",
    "diff": "engine.diff",
    "evaluate": "study.evaluate",
    "extract": "twin.masks.extract",
    "extract_lora": "engine.adapters.extract",
    "merge": "engine.merge",
    "merge_lora": "engine.adapters.merge",
    "open_suite": "tasks.suite",
    "read_recipe": "recipes.recipe",
    "search": "study.search",
}
__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from twinmerge.continual.continual import Continual as Continual
    from twinmerge.engine.adapters.extract import extract_lora as extract_lora
    from twinmerge.engine.adapters.merge import merge_lora as merge_lora
    from twinmerge.engine.diff import diff as diff
    from twinmerge.engine.merge import Merge as Merge
    from twinmerge.engine.merge import merge as merge
    from twinmerge.errors import DamagedFile as DamagedFile
    from twinmerge.errors import DataError as DataError
    from twinmerge.errors import ModelError as ModelError
    from twinmerge.errors import OutputError as OutputError
    from twinmerge.errors import RecipeError as RecipeError
    from twinmerge.errors import ResourceError as ResourceError
    from twinmerge.errors import TwinmergeError as TwinmergeError
    from twinmerge.errors import UsageError as UsageError
    from twinmerge.models.torch_module import TorchModel as TorchModel
    from twinmerge.recipes.recipe import Recipe as Recipe
    from twinmerge.recipes.recipe import read_recipe as read_recipe
    from twinmerge.study.evaluate import evaluate as evaluate
    from twinmerge.study.search import search as search
    from twinmerge.tasks.suite import open_suite as open_suite
    from twinmerge.twin.call import TwinOutput as TwinOutput
    from twinmerge.twin.masks.build import compress as compress
    from twinmerge.twin.masks.extract import extract as extract
    from twinmerge.twin.predict import Prediction as Prediction
    from twinmerge.twin.twin import Twin as Twin


def __getattr__(name: str) -> Any:
    if name == "__version__":  # of what is installed: pyproject.toml alone names it
        from importlib.metadata import version

        return version("twinmerge")
    if name not in _WHERE:
        raise AttributeError(f"module 'twinmerge' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"twinmerge.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
