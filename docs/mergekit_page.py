"""Write docs/mergekit.md out of the tables that the code itself follows.

    python docs/mergekit_page.py

What stands between the two marks of the page is written by hand and kept.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from twinmerge.methods.kit.dialect import Dialect, Number, Switch
from twinmerge.methods.kit.registry import method_class, method_names
from twinmerge.recipes import mergekit
from twinmerge.recipes.mergekit_options import OPTIONS
from twinmerge.recipes.mergekit_parameters import PARAMETERS

PAGE = Path(__file__).with_name("mergekit.md")
BEGIN, END = "<!-- written by hand -->", "<!-- end -->"

KEYS = {
    "merge_method": "the method, by mergekit's name; its formula is mergekit's (`compat: mergekit`)",
    "base_model": "the base; of methods without changes to a base one more input, as by mergekit",
    "models": "whole models",
    "slices": "layers of models, one slice after the other",
    "modules": "one module (`default`) with slices or models; others are refused with the parts that the model has, which filters name",
    "parameters": "of all models, of a module, a slice, a model or a source: the innermost that fits counts",
    "dtype": "of the output, where there is no `out_dtype`, also as `torch.float32`; sums are in float32 or wider. Without either each tensor has a dtype that holds the numbers of all its inputs, as by mergekit",
    "out_dtype": "of the output",
    "tokenizer": "union, base or a model's; rules for tokens; `pad_to_multiple_of`; in a union the other models' tokens come in the order of the models, where mergekit's order differs from run to run",
    "tokenizer_source": "the same in its older form",
    "chat_template": "auto, a name, or a template; alpaca, chatml, exaone, llama3 and mistral write what their models publish, without the white space that mergekit's have besides",
    "name": "of one of several documents; ignored in a file of one, with a warning",
    "model": "a path, a hub id, `model@revision`, `model+adapter`, or mergekit's long form; a folder has no revision, and its class is that of its config: `@revision` and `override_architecture` are passed over with a warning",
    "layer_range": 'half-open, whole numbers in any form (`["0", 16.0]`); backwards or empty is refused',
    "sources": "of a slice, side by side",
    "residual_weight": "read, and used nowhere, as by mergekit",
    "experts": "mergekit-moe's files are named so, and not read yet",
    "gate_mode": "as `experts`",
    "experts_per_token": "as `experts`",
    "shared_experts": "as `experts`",
}
COMMANDS = {
    "mergekit-yaml FILE OUT": "`twinmerge merge FILE OUT`",
    "mergekit-multi FILE --intermediate-dir D": "`twinmerge merge FILE OUT`, without the folders on the way; with `--intermediate-dir D` they are written too",
    "mergekit-extract-lora": "`twinmerge lora extract`",
    "mergekit-moe": "not yet",
    "mergekit-tokensurgeon": "`twinmerge transplant MODEL --tokenizer DONOR -o OUT`: its omp, and subword mean as `subtokens`; also `nearest` and `copy`; matched by text",
    "mergekit-pytorch": "`twinmerge merge --by-names`: tensors by their names alone, single files too",
    "mergekit-evolve": "`twinmerge search` varies parameters on a suite",
    "mergekit-legacy": "`twinmerge merge --method … --expert …`",
    "mergekit-layershuffle, bakllama": "do not run in 0.1.5; write `slices`",
}


def keys() -> list[str]:
    """Every key that the code knows."""
    known = [*mergekit.TOP_KEYS, *mergekit.OF_MOE, *mergekit.MODEL_KEYS, *mergekit.SLICE_KEYS]
    return list(dict.fromkeys([*known, *mergekit.SOURCE_KEYS, *mergekit.MODULE_KEYS]))


def page(by_hand: str) -> str:
    """The whole page."""
    missing = [key for key in keys() if key not in KEYS]
    if missing:
        raise SystemExit(f"Say in {__file__} what the keys {', '.join(missing)} are here.")
    methods = {
        theirs: (name, dialect) for name in method_names() for theirs, dialect in method_class(name).mergekit.items()
    }
    lines = [
        "# Files and habits of mergekit",
        "",
        "A recipe of mergekit runs as it is: `twinmerge merge recipe.yaml OUT`. `python docs/mergekit_page.py` writes this page out of",
        "the tables that the code follows. It was compared with mergekit 0.1.5.",
        "",
        "## Keys",
        "",
        "| key | here |",
        "| --- | --- |",
        *(f"| `{key}` | {KEYS[key]} |" for key in keys()),
        "",
        "Nearly the name of a key is an error. Any other key that mergekit ignores is ignored with a warning that names it.",
        "",
        "## Methods",
        "",
        "| mergekit | here | its parameters, with the field here and the default |",
        "| --- | --- | --- |",
        *(f"| `{theirs}` | `{name}` | {parameters(dialect)} |" for theirs, (name, dialect) in sorted(methods.items())),
    ]
    unused = sorted(p for p in PARAMETERS if not any(p in d.own or p in d.shared for _, d in methods.values()))
    if unused:
        lines += ["", f"Parameters of no method here, ignored with a warning: {', '.join(f'`{p}`' for p in unused)}."]
    lines += ["", "## Options of the command", "", "| mergekit | here |", "| --- | --- |"]
    lines += [f"| `{name}` | {option_said(name)} |" for name in sorted(OPTIONS)]
    lines += ["", "## Commands", "", "| mergekit | here |", "| --- | --- |"]
    lines += [f"| `{theirs}` | {here} |" for theirs, here in COMMANDS.items()]
    lines += ["", BEGIN, by_hand.strip("\n"), END]
    return "\n".join(lines) + "\n"


def parameters(dialect: Dialect) -> str:
    """The parameters of a method of mergekit."""
    said = [f"`{key}` (each model): {_field(number)}" for key, number in dialect.own.items()]
    said += [f"`{key}`: {_field(each)}" for key, each in dialect.shared.items()]
    return "; ".join([*said, *(f"`{key}`: no need of it" for key in sorted(dialect.idle))]) or "none"


def _field(said: Number | Switch) -> str:
    if isinstance(said, Switch):
        if said.refused:
            return "refused where true"
        return f"{said.field or 'nothing'}, {str(said.default).lower()}"
    return f"{said.field}, {'must be given' if said.default is None else f'{said.default:g}'}"


def option_said(name: str) -> str:
    """What an option of mergekit is here."""
    option = OPTIONS[name]
    here = f"`{' '.join(option.here).format('VALUE')}`" if option.here else ""
    text = f"refused: {option.said}" if option.refused else option.said
    return "; ".join(part for part in (here, text) if part) or "no need of it"


def by_hand() -> str:
    """What stands between the marks."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    found = re.search(f"{re.escape(BEGIN)}\n(.*?){re.escape(END)}", text, re.DOTALL)
    return found[1] if found else ""


if __name__ == "__main__":
    PAGE.write_text(page(by_hand()), encoding="utf-8")
    print(PAGE.name, file=sys.stderr)
