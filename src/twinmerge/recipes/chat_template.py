"""Templates of chats: those that have a name, and what a recipe may say instead."""

from __future__ import annotations

from typing import Any

from twinmerge.errors import RecipeError, nearest

KEY = "chat_template"
AUTO = "auto"
SHORTEST = 20  # characters of a template, below which a text is taken for a name that is none

BUILT_IN = {
    "alpaca": (
        "{%- for message in messages -%}\n"
        "{%- if message['role'] == 'system' -%}\n"
        "{{- message['content'] ~ '\\n\\n' -}}\n"
        "{%- elif message['role'] == 'user' -%}\n"
        "{{- '### Instruction:\\n' ~ message['content'] ~ '\\n\\n' -}}\n"
        "{%- elif message['role'] == 'assistant' -%}\n"
        "{{- '### Response:\\n' ~ message['content'] ~ '\\n\\n' -}}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n"
        "{{- '### Response:\\n' -}}\n"
        "{%- endif -%}\n"
    ),
    "chatml": (
        "{%- for message in messages -%}\n"
        "{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' -}}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n"
        "{{- '<|im_start|>assistant\\n' -}}\n"
        "{%- endif -%}\n"
    ),
    "exaone": (
        "{%- for message in messages -%}\n"
        "{%- if loop.first and message['role'] != 'system' -%}\n"
        "{{- '[|system|][|endofturn|]\\n' -}}\n"
        "{%- endif -%}\n"
        "{{- '[|' ~ message['role'] ~ '|]' ~ message['content'] -}}\n"
        "{%- if message['role'] == 'user' -%}\n"
        "{{- '\\n' -}}\n"
        "{%- else -%}\n"
        "{{- '[|endofturn|]\\n' -}}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n"
        "{{- '[|assistant|]' -}}\n"
        "{%- endif -%}\n"
    ),
    "llama3": (
        "{{- bos_token -}}\n"
        "{%- for message in messages -%}\n"
        "{{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' -}}\n"
        "{{- message['content'] | trim ~ '<|eot_id|>' -}}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}\n"
        "{%- endif -%}\n"
    ),
    "mistral": (
        "{{- bos_token -}}\n"
        "{%- set system = messages[0]['content'] ~ '\\n\\n' if messages[0]['role'] == 'system' else '' -%}\n"
        "{%- set turns = messages[1:] if system else messages -%}\n"
        "{%- for message in turns -%}\n"
        "{%- if message['role'] == 'user' -%}\n"
        "{{- '[INST] ' ~ (system if loop.first else '') ~ message['content'] ~ ' [/INST]' -}}\n"
        "{%- elif message['role'] == 'assistant' -%}\n"
        "{{- ' ' ~ message['content'] | trim ~ eos_token -}}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
    ),
}
"""Name -> template, each as the models of that format publish how they write a chat. mergekit's of the same names have
more white space, but for chatml."""


def check_template(raw: Any, where: str) -> str | None:
    """What a recipe says of the template: auto, a name, or a template; None for the tokenizer's own.

    Raises:
        RecipeError: none of these.

    Example:
        >>> check_template("chatml", "it")
        'chatml'
        >>> check_template("chatlm", "it")
        Traceback (most recent call last):
        ...
        twinmerge.errors.RecipeError: it: chat_template is 'chatlm', which is no template. Did you mean 'chatml'? \
Write auto, alpaca, chatml, exaone, llama3, mistral, or a template in Jinja.
    """
    if raw is None:
        return None
    if isinstance(raw, str) and (raw == AUTO or raw in BUILT_IN):
        return raw
    if not isinstance(raw, str) or len(raw) < SHORTEST or "{" not in raw:
        raise RecipeError(
            f"{where}: {KEY} is {raw!r:.80}, which is no template.{nearest(str(raw), [AUTO, *BUILT_IN])} Write "
            f"{', '.join([AUTO, *BUILT_IN])}, or a template in Jinja."
        )
    if (wrong := fault_of(raw)) is not None:
        raise RecipeError(f"{where}: {KEY} is no template that Jinja reads: {wrong}. Mend it, or name a built-in one.")
    return raw


def fault_of(template: str) -> str | None:
    """Why Jinja does not read a template; None where it does."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser

    class Generation(Extension):
        """The tag with which transformers marks what the model itself writes."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        jinja2.Environment(extensions=[Generation, loopcontrols]).parse(template)
    except jinja2.TemplateError as error:
        return f"{error.message} (line {getattr(error, 'lineno', 1)})"
    except RecursionError:
        return "it is nested too deep"
    return None
