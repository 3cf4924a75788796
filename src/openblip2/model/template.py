"""What stands around the soft visual prompt: one string with the slots `{image}`, `{prompt}` and `{bos}`.

`{image}` is where the soft prompt goes, `{prompt}` the user's text, `{bos}` the tokenizer's first token. The paper's
is `{image}{bos}{prompt}`; `chat` makes one from the tokenizer's chat template.
"""

from string import Formatter
from typing import TYPE_CHECKING

from openblip2.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAPER_TEMPLATE = "{image}{bos}{prompt}"
SLOTS = "{image}, {prompt} and {bos}"


def resolve_template(template: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The template with `{bos}` filled in, or, for `chat`, one made from the tokenizer's chat template.

    Braces of the text itself are doubled in both.

    Raises:
        UserError: a slot is unknown, `{image}` does not stand in it exactly once, or there is no chat template.
    """
    if template == "chat":
        filled = _chat_template(tokenizer)
    else:
        slots = {"image": "{image}", "prompt": "{prompt}", "bos": _escape(str(tokenizer.bos_token or ""))}
        try:
            parts = list(Formatter().parse(template))
        except ValueError as error:
            raise UserError(f"template {template!r}: {error}; slots are {SLOTS}") from error
        if any(slot not in (*slots, None) or spec or convert for _, slot, spec, convert in parts):
            raise UserError(f"template {template!r}: slots are {SLOTS}")
        filled = "".join(_escape(text) + slots.get(slot or "", "") for text, slot, _, _ in parts)
    if [slot for _, slot, *_ in Formatter().parse(filled)].count("image") != 1 or filled.count("{image}") != 1:
        raise UserError(f"template {template!r} must hold {{image}} exactly once")
    return filled


def _chat_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    if not tokenizer.chat_template:
        raise UserError(f"template 'chat': this tokenizer has no chat template; use {PAPER_TEMPLATE!r}")
    turns = [{"role": "user", "content": "<<image>><<prompt>>"}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return _escape(text).replace("<<image>>", "{image}").replace("<<prompt>>", "{prompt}")


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
