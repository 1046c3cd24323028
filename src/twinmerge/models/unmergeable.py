"""Files whose numbers are no weights of a model as they stand: quantised ones, and LoRAs in a file of their own.

Each is refused by what it is, and with what makes a model of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from twinmerge.errors import ModelError
from twinmerge.store.locate import base_of

QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|absmax|nested_absmax|quant_map|quant_state\.\w+|SCB|weight_format|weight_scale|"
    r"weight_scale_inv|input_scale|scale_weight|weight_packed|weight_shape|weight_zero_point|\w+_proj_blocks|\w+_proj_scales)$"
)
"""Ends of the names that packed numbers and their scales have: GPTQ and AWQ, bitsandbytes, FP8, compressed-tensors,
MXFP4."""
LORAS = {
    re.compile(r"\.hada_w[12]_[ab]$|\.hada_t[12]$"): "LoHa (LyCORIS)",
    re.compile(r"\.lokr_w[12](_[ab])?$|\.lokr_t2$"): "LoKr (LyCORIS)",
    re.compile(r"\.oft_(blocks|diag)$"): "OFT (LyCORIS)",
    re.compile(r"^lora_\w+\.[ab][12]\.weight$"): "GLoRA (LyCORIS)",
    re.compile(r"^lora_\w+\.(lora_(up|down|mid)\.weight|alpha|dora_scale|diff(_b)?)$"): "a LoRA of kohya's scripts",
    re.compile(r"[._]lora[._](up|down)\.weight$|\.lora_linear_layer\.(up|down)\.weight$"): "a LoRA of diffusers",
    re.compile(r"\.lora_(embedding_)?[AB](\.\w+)?(\.weight)?$"): "a LoRA of PEFT",
}
"""Names of tensors -> what the file is that has them."""
PACKED = re.compile(r"(-unsloth)?-(bnb-[48]bit|(GPTQ|AWQ)(-Int[48])?|FP8|4bit|8bit)$", re.IGNORECASE)
"""The end of the names that quantised copies of models are published under."""
LOADED_PLAIN = {
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
"""Kinds of quantisation that transformers undoes on loading -> the class of its config that says so."""


def refuse_tensors(names: Iterable[str], where: str) -> None:
    """Refuse the tensors of a checkpoint that no class is asked of, where their names say that they are no weights.

    Raises:
        ModelError: a LoRA, or packed numbers.

    Example:
        >>> refuse_tensors(["lora_unet_mid.lora_up.weight"], "x.safetensors")
        Traceback (most recent call last):
        ...
        twinmerge.errors.ModelError: x.safetensors is a LoRA of kohya's scripts ('lora_unet_mid.lora_up.weight'), no \
model: the factors of changes do not merge as weights do. Merge it into its checkpoint with the tool that made it, and \
give that.
    """
    for name in names:
        for pattern, kind in LORAS.items():
            if pattern.search(name):
                raise ModelError(
                    f"{where} is {kind} ({name!r}), no model: the factors of changes do not merge as weights do. "
                    + (
                        "Write base+adapter with its folder."
                        if kind.endswith("PEFT")
                        else "Merge it into its checkpoint with the tool that made it, and give that."
                    )
                )
        if QUANTISED.search(name):
            raise ModelError(
                f"{where} is quantised ({name!r}), and quantised weights cannot be merged. Give the 16-bit or 32-bit "
                "model that it was made of."
            )


def refuse_quantised(config: Mapping[str, Any], folder: Path, adapter: Path | None = None) -> None:
    """Refuse a model whose config says that its weights are quantised.

    Args:
        config: of the model.
        folder: that it is in.
        adapter: that is to be put on it.

    Raises:
        ModelError: it does, with the command that makes plain weights of them where there is one.
    """
    said = config.get("quantization_config")
    if said is None:
        return
    kind = str(said.get("quant_method") or "") if isinstance(said, Mapping) else ""
    if not kind and isinstance(said, Mapping) and (said.get("load_in_4bit") or said.get("load_in_8bit")):
        kind = "bitsandbytes"  # before configs named it
    what = f"{folder} is quantised{f' ({kind})' if kind else ''}, and quantised weights cannot be merged."
    if adapter is not None:
        raise ModelError(f"{what} {_on_full_precision(config, folder, adapter)}")
    raise ModelError(f"{what} {_restored(kind, config.get('architectures'), folder)}")


def _on_full_precision(config: Mapping[str, Any], folder: Path, adapter: Path) -> str:
    """Which base an adapter of a quantised one is put on: the model that it was made of, where something names it."""
    made_of = config.get("_name_or_path")
    named = [made_of] if isinstance(made_of, str) and made_of and made_of != str(folder) else []
    named += [name for name in (base_of(adapter),) if name]
    for name in named:
        full = PACKED.sub("", name)
        if full != name or not _same_folder(name, folder):
            return f"Put the adapter on the full-precision model that it was made of: {full}+{adapter}."
    return f"Put the adapter on the full-precision model that it was made of: that+{adapter}."


def _same_folder(name: str, folder: Path) -> bool:
    return os.path.realpath(name) == os.path.realpath(folder)


def _restored(kind: str, classes: Any, folder: Path) -> str:
    """What makes a model of 16 bits of it."""
    named = classes[0] if isinstance(classes, list) and classes and str(classes[0]).isidentifier() else None
    loaded = f"transformers.{named or 'AutoModelForCausalLM'}.from_pretrained({str(folder)!r}"
    if kind in ("", "bitsandbytes", "higgs"):
        loaded += ").dequantize()"
    elif kind in LOADED_PLAIN:
        loaded += f", quantization_config=transformers.{LOADED_PLAIN[kind]}(dequantize=True))"
    else:
        return "Give the 16-bit or 32-bit model that it was made of: no library restores this kind."
    made = f"{folder.name}-16bit"
    return (
        "Best give the model that it was made of; else restore 16 bits, and merge that: "
        f'python -c "import transformers; {loaded}.save_pretrained({made!r})"'
    )
