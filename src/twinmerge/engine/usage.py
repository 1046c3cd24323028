"""How a model that was written is opened: the library, and lines of Python that run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from twinmerge.models.answers import Answers, answers_of
from twinmerge.models.own_classes import OWN_CLASSES
from twinmerge.models.parts import MODULES, PIPELINE, class_of_parts, config_in
from twinmerge.store.foreign import matches, read_json

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model", "sentencepiece.*", "*.tiktoken")
IMAGES = ("preprocessor_config.json", "processor_config.json")
TWINS = "twinmerge"
"""The library that opens twins."""
HERE = 'folder = "."  # where this folder is, or its id on the hub\n'
TEXT = 'tokenizer("The film was", return_tensors="pt")'
ANSWERS = {
    "SentenceTransformer": 'model.encode(["A text", "Another text"]).shape',
    "SparseEncoder": 'model.encode(["A text", "Another text"]).shape',
    "CrossEncoder": 'model.predict([("A question", "A text")])',
}
"""What shows that a class of sentence-transformers works."""


class Usage(NamedTuple):
    """library: by its name on the hub, None where none opens the folder; code: that opens and tries the model; task: by
    the hub's name (`pipeline_tag`), None where it has none."""

    library: str | None
    code: str
    task: str | None = None


def usage_of(folder: Path, known: bool = True) -> Usage:
    """How to use a folder.

    Args:
        folder: with all but its card.
        known: whether some class opens it, beyond names of tensors.
    """
    if (folder / MODULES).is_file():
        name = class_of_parts(folder).name
        code = f"model = {name}(folder)\nprint({ANSWERS[name]})\n"
        task = OF_ENCODERS[name]
        return Usage("sentence-transformers", f"from sentence_transformers import {name}\n\n{HERE}{code}", task)
    if (folder / PIPELINE).is_file():
        return Usage("diffusers", _opened(*class_of_parts(folder), "pipeline"))
    config = config_in(folder)
    if (own := _word(config.get("_class_name"))) is not None:
        return Usage("diffusers", _opened("diffusers", own, "model"))
    if not known:
        return Usage(None, _tensors())
    has = os.listdir(folder)
    text, images = (any(matches(name, of) for name in has) for of in (TOKENIZERS, IMAGES))
    if heads := _heads(folder):
        first = next(iter(heads))
        code = _transformers(
            heads[first], text, images, False, answers_of(config_in(folder / "heads" / first)), [*heads]
        )
        tasks = {task_of_class(own) for own in heads.values()}
        return Usage(TWINS, code, tasks.pop() if len(tasks) == 1 else None)
    named = config.get("architectures")
    own = _word(named[0]) if isinstance(named, list) and named else None
    if own is None or "model_type" not in config:
        return Usage(None, _tensors())
    code = _transformers(own, text, images, bool(config.get("is_encoder_decoder")), answers_of(config))
    return Usage(TWINS if own in OWN_CLASSES else "transformers", code, task_of_class(own))


def _heads(folder: Path) -> dict[str, str]:
    """Expert -> the class of its head, of a folder with heads."""
    table = read_json(folder / "heads.json") if (folder / "heads.json").is_file() else {}
    return {name: own for name, entry in table.items() if (own := _word(entry.get("class"))) is not None}


def twin_usage(folder: Path, task: str | None, expert: str | None, answers: Answers | None) -> str:
    """The lines that open a twin and ask it.

    Args:
        folder: of its shared model, with all that lies beside it.
        task: of the twin, as the hub calls it.
        expert: that is to be named, since nothing routes.
        answers: what the outputs of all heads say; None where they differ.
    """
    has = os.listdir(folder)
    text, images = (any(matches(name, of) for name in has) for of in (TOKENIZERS, IMAGES))
    named = "" if expert is None else f", expert={expert!r}"

    def asked(rows: str) -> str:
        return f"print({ASKED[answers].format(rows=rows, named=named)})\n"

    first, ask = "", "print(twin)\n"
    if task == "text-classification" and text:
        ask = asked('["The film was"]')
    elif task == "image-classification" and images:
        first, ask = "from PIL import Image\n\n", asked('[Image.new("RGB", (64, 64))]')
    elif task == "text-generation" and text:
        ask = (
            f'tokens = twin.generate(**twin.encode(["The film was"]), max_new_tokens=20{named})\n'
            "print(twin.encoder.tokenizer.decode(tokens[0], skip_special_tokens=True))\n"
        )
    return f"{first}import twinmerge as tm\n\n{HERE}twin = tm.Twin.from_pretrained(folder)\n{ask}"


def adapter_usage(own: str, labels: int = 0, other: bool = False) -> str:
    """The lines that put an adapter on its base.

    Args:
        own: the name of the base's class.
        labels: of the output layers that the adapter holds in full; 0 where it holds none.
        other: whether the base has such layers in another shape.
    """
    kind, library = auto_class(own), OWN_CLASSES.get(own, "transformers")
    more = f", num_labels={labels}" if labels and own.endswith(("Classification", "QuestionAnswering")) else ""
    more += ", ignore_mismatched_sizes=True" if other else ""
    opened = "PeftConfig.from_pretrained(folder).base_model_name_or_path"
    base = f"{kind}.from_pretrained({opened}{more})" if not more else f"{kind}.from_pretrained(\n    {opened}{more}\n)"
    return (
        f"from peft import PeftConfig, PeftModel\nfrom {library} import {kind}\n\n{HERE}base = {base}\n"
        "model = PeftModel.from_pretrained(base, folder)\nprint(type(model).__name__)\n"
    )


def auto_class(own: str) -> str:
    """The auto class that opens a class, by what its name ends with; the class itself where there is none.

    Example:
        >>> auto_class("BertForSequenceClassification"), auto_class("Wav2Vec2ForSequenceClassification")
        ('AutoModelForSequenceClassification', 'AutoModelForAudioClassification')
    """
    if own in OWN_CLASSES:
        return own
    if HEARS.fullmatch(own):
        return "AutoModelForAudioClassification"
    if WRITES.fullmatch(own):
        return "AutoModelForSpeechSeq2Seq"
    return next((auto for end, auto in AUTO.items() if own.endswith(end)), own)


def task_of_class(own: str) -> str | None:
    """What the hub calls the task of a class; None where it has several, or none.

    Example:
        >>> task_of_class("GPT2LMHeadModel"), task_of_class("CLIPModel"), task_of_class("BartForConditionalGeneration")
        ('text-generation', 'zero-shot-image-classification', None)
    """
    return OF_CLASSES.get(own) or TASKS.get(auto_class(own))


def _transformers(
    own: str, text: bool, images: bool, decodes: bool, answers: Answers, heads: Sequence[str] = ()
) -> str:
    """The lines for a class of transformers, by what its name ends with.

    Args:
        own: the class; of a folder with heads that of the first.
        text, images: whether what reads them is there.
        decodes: whether it is an encoder with a decoder.
        answers: what its outputs say.
        heads: their names, where there are any.
    """
    kind = auto_class(own)
    more, reads = "", ""
    if kind == "AutoModelForImageClassification" or own in OWN_CLASSES:
        if images:
            reads, more = "AutoImageProcessor", f"{LOOKED}{SHOWN[answers]}"
    elif text and kind in TRIED and not (decodes and kind == "AutoModel"):
        reads, more = "AutoTokenizer", TRIED[kind]
        more += SHOWN[answers] if kind == "AutoModelForSequenceClassification" else ""
    name = {"AutoImageProcessor": "processor", "AutoTokenizer": "tokenizer"}.get(reads, "")
    first = "from PIL import Image\n" if name == "processor" else ""
    end = f"{name} = {reads}.from_pretrained(folder)\n{more}" if name else "print(type(model).__name__)\n"
    if not heads and own not in OWN_CLASSES:
        return _opened("transformers", kind, "model", reads, end, first)
    first += f"from transformers import {reads}\n" if reads else ""
    if heads:
        opens = f"model = tm.load(folder).head({heads[0]!r})  # or another: {', '.join(heads)}\n"
        return f"{first}\nimport twinmerge as tm\n\n{HERE}{opens}{end}".lstrip()
    opens = f"model = {own}.from_pretrained(folder)\n"
    return f"{first}\nfrom {OWN_CLASSES[own]} import {own}\n\n{HERE}{opens}{end}".lstrip()


def _opened(library: str, kind: str, name: str, other: str = "", end: str = "", first: str = "") -> str:
    """Lines that open a model, and what reads its inputs."""
    kinds = sorted(filter(None, (kind, other)))
    end = end or f"print(type({name}).__name__)\n"
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
    "ForCTC": "AutoModelForCTC",
    "Model": "AutoModel",
}
"""How the name of a class ends -> what opens it; a class of any other kind is named itself."""

HEARS = re.compile(
    r"(AST|Data2VecAudio|Hubert|SEWD?|UniSpeech(Sat)?|Wav2Vec2(Bert|Conformer)?|WavLM|Whisper)"
    r"For(Sequence|Audio)Classification"
)
"""Classifiers of sounds, whose names end as those of texts do."""
WRITES = re.compile(r"(Whisper|Speech2Text|Moonshine)ForConditionalGeneration")
"""What writes down speech, of the classes that write something down."""
OF_CLASSES = {
    **dict.fromkeys(OWN_CLASSES, "image-classification"),
    **dict.fromkeys(
        (
            "CLIPModel",
            "SiglipModel",
            "Siglip2Model",
            "AltCLIPModel",
            "ChineseCLIPModel",
            "MetaClip2Model",
            "AlignModel",
        ),
        "zero-shot-image-classification",
    ),
}
"""Class -> what the hub calls its task, where its auto class does not say it."""

OF_ENCODERS = {
    "SentenceTransformer": "sentence-similarity",
    "SparseEncoder": "feature-extraction",
    "CrossEncoder": "text-ranking",
}
TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
}
"""Class -> what the hub calls its task."""

SHOWN: Mapping[Answers, str] = {
    "one label": "print(model.config.id2label[logits.argmax().item()])\n",
    "several labels": "print({model.config.id2label[i]: p for i, p in enumerate(logits.sigmoid().tolist())})\n",
    "a number": "print(logits.tolist())\n",
}
"""What a row's logits say -> the line that shows it."""
ASKED: Mapping[Answers | None, str] = {
    "one label": "twin.predict({rows}{named})",
    "several labels": "twin.predict_proba({rows}{named})",
    "a number": "twin(**twin.encode({rows}){named}).logits",
    None: "twin(**twin.encode({rows}){named}).logits",
}
"""What the outputs of a twin say -> the call that shows it."""

LOOKED = 'inputs = processor(Image.new("RGB", (64, 64)), return_tensors="pt")\nlogits = model(**inputs).logits[0]\n'
TRIED = {
    "AutoModelForCausalLM": (
        f"inputs = {TEXT}\n"
        'tokens = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=20)\n'
        "print(tokenizer.decode(tokens[0], skip_special_tokens=True))\n"
    ),
    "AutoModelForSequenceClassification": f"logits = model(**{TEXT}).logits[0]\n",
    "AutoModelForTokenClassification": (
        f"logits = model(**{TEXT}).logits[0]\nprint([model.config.id2label[i] for i in logits.argmax(-1).tolist()])\n"
    ),
    "AutoModelForMaskedLM": f"print(model(**{TEXT}).logits.shape)\n",
    "AutoModel": f"print(model(**{TEXT}).last_hidden_state.shape)\n",
}
"""What opens a model of texts -> lines that try it."""
