"""How a model that was written is opened: the library, and lines of Python that run."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from twinmerge.models.parts import MODULES, PIPELINE, class_of_parts, config_in
from twinmerge.store.foreign import matches

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model", "sentencepiece.*", "*.tiktoken")
IMAGES = ("preprocessor_config.json", "processor_config.json")
HERE = 'folder = "."  # where this folder is, or its id on the hub\n'
TEXT = 'tokenizer("The film was", return_tensors="pt")'
ANSWERS = {
    "SentenceTransformer": 'model.encode(["A text", "Another text"]).shape',
    "SparseEncoder": 'model.encode(["A text", "Another text"]).shape',
    "CrossEncoder": 'model.predict([("A question", "A text")])',
}
"""What shows that a class of sentence-transformers works."""


class Usage(NamedTuple):
    """library: by its name on the hub, None where none opens the folder; code: that opens and tries the model."""

    library: str | None
    code: str


def usage_of(folder: Path, known: bool = True, twin: bool = False) -> Usage:
    """How to use a folder.

    Args:
        folder: with all but its card.
        known: whether some class opens it, beyond names of tensors.
        twin: it is one.
    """
    if twin:
        return Usage(
            "twinmerge", f"import twinmerge as tm\n\n{HERE}twin = tm.Twin.from_pretrained(folder)\nprint(twin)\n"
        )
    if (folder / MODULES).is_file():
        name = class_of_parts(folder).name
        code = f"model = {name}(folder)\nprint({ANSWERS[name]})\n"
        return Usage("sentence-transformers", f"from sentence_transformers import {name}\n\n{HERE}{code}")
    if (folder / PIPELINE).is_file():
        return Usage("diffusers", _opened(*class_of_parts(folder), "pipeline"))
    config = config_in(folder)
    if (own := _word(config.get("_class_name"))) is not None:
        return Usage("diffusers", _opened("diffusers", own, "model"))
    named = config.get("architectures")
    own = _word(named[0]) if isinstance(named, list) and named else None
    if not known or own is None or "model_type" not in config:
        return Usage(None, _tensors())
    has = os.listdir(folder)
    text, images = (any(matches(name, of) for name in has) for of in (TOKENIZERS, IMAGES))
    return Usage("transformers", _transformers(own, text, images, bool(config.get("is_encoder_decoder"))))


def _transformers(own: str, text: bool, images: bool, decodes: bool) -> str:
    """The lines for a class of transformers, by what its name ends with."""
    kind = next((auto for end, auto in AUTO.items() if own.endswith(end)), own)
    if kind == "AutoModelForImageClassification":
        if not images:
            return _opened("transformers", kind, "model")
        more = (
            'inputs = processor(Image.new("RGB", (64, 64)), return_tensors="pt")\n'
            "print(model.config.id2label[model(**inputs).logits[0].argmax().item()])\n"
        )
        return (
            _opened("transformers", kind, "model", "AutoImageProcessor", "processor", "from PIL import Image\n") + more
        )
    if not text or kind not in TRIED or (decodes and kind == "AutoModel"):
        return _opened("transformers", kind, "model")
    return _opened("transformers", kind, "model", "AutoTokenizer", "tokenizer") + TRIED[kind]


def _opened(library: str, kind: str, name: str, other: str = "", reads: str = "", first: str = "") -> str:
    """Lines that open a model, and what reads its inputs."""
    kinds = sorted(filter(None, (kind, other)))
    end = f"{reads} = {other}.from_pretrained(folder)\n" if other else f"print(type({name}).__name__)\n"
    return f"{first}from {library} import {', '.join(kinds)}\n\n{HERE}{name} = {kind}.from_pretrained(folder)\n{end}"


def _tensors() -> str:
    return (
        "from glob import glob\n\nfrom safetensors.torch import load_file\n\n"
        f'{HERE}tensors = {{}}\nfor file in glob(f"{{folder}}/*.safetensors"):\n    tensors |= load_file(file)\n'
        "print(len(tensors))\n"
    )


def _word(name: object) -> str | None:
    """The name of a class, and nothing else that a config may hold."""
    return name if isinstance(name, str) and re.fullmatch(r"[A-Za-z]\w{0,80}", name, re.ASCII) else None


AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForImageClassification": "AutoModelForImageClassification",
    "Model": "AutoModel",
}
"""How the name of a class ends -> what opens it; a class of any other kind is named itself."""

TRIED = {
    "AutoModelForCausalLM": (
        f"inputs = {TEXT}\n"
        'tokens = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=20)\n'
        "print(tokenizer.decode(tokens[0], skip_special_tokens=True))\n"
    ),
    "AutoModelForSequenceClassification": (
        f"logits = model(**{TEXT}).logits[0]\nprint(model.config.id2label[logits.argmax().item()])\n"
    ),
    "AutoModelForTokenClassification": (
        f"logits = model(**{TEXT}).logits[0]\nprint([model.config.id2label[i] for i in logits.argmax(-1).tolist()])\n"
    ),
    "AutoModelForMaskedLM": f"print(model(**{TEXT}).logits.shape)\n",
    "AutoModel": f"print(model(**{TEXT}).last_hidden_state.shape)\n",
}
"""What opens a model of texts -> lines that try it."""
