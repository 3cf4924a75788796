"""The text around the soft visual prompt: one string with the slots `{image}`, `{prompt}` and `{bos}`.

`{image}` is replaced by the soft prompt, `{prompt}` by the user's text, and `{bos}` by the tokenizer's first token. The
paper's template is `{image}{bos}{prompt}`; `chat` makes one from the tokenizer's chat template. For questions,
`dialogue` writes the text for `{prompt}` of any template: one question, after earlier questions with answers if any.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from string import Formatter
from typing import TYPE_CHECKING, Any

from openblip2.errors import UserError, one_line, require_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAPER_TEMPLATE = "{image}{bos}{prompt}"
_LIKE_A_CONTROL_TOKEN = re.compile(r"<.+>|\[.+\]")
SLOTS = "{image}, {prompt} and {bos}"


class Turns(str):
    """A prompt whose control tokens come from a chat template, and keep their special meaning."""


def split_control_tokens(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Breaks control tokens in a user's text: "</s>" becomes "< /s>", which is treated as plain text."""
    require_unicode(text)
    if isinstance(text, Turns):
        return text
    pattern = _control_tokens(tokenizer)
    while pattern.search(text):  # the replaced text may contain another one
        text = pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
    return text


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    added = tokenizer.added_tokens_decoder.values()
    # Some tokenizers do not mark all control tokens as special, for example Qwen3's <think>.
    texts = {one.content for one in added if one.special or _LIKE_A_CONTROL_TOKEN.fullmatch(one.content)}
    longest_first = sorted((text for text in texts if len(text.strip()) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)", re.IGNORECASE)


def resolve_template(template: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The template with `{bos}` filled in, or, for `chat`, one made from the tokenizer's chat template.

    In both cases, braces that belong to the text itself are doubled.

    Raises:
        UserError: a slot is unknown, `{image}` does not occur exactly once, or there is no chat template.
    """
    if template == "chat":
        if not tokenizer.chat_template:
            raise UserError(f"template 'chat': this tokenizer has no chat template; use {PAPER_TEMPLATE!r}")
        text = _escape(_chat(tokenizer, ["<<image>><<prompt>>"]))
        filled = text.replace("<<image>>", "{image}").replace("<<prompt>>", "{prompt}")
    else:
        slots = {"image": "{image}", "prompt": "{prompt}", "bos": _escape(str(tokenizer.bos_token or ""))}
        try:
            parts = list(Formatter().parse(template))
        except ValueError as error:
            raise UserError(f"template {template!r}: {error}; the slots are {SLOTS}") from error
        if any(slot not in (*slots, None) or spec or convert for _, slot, spec, convert in parts):
            raise UserError(f"template {template!r}: the slots are {SLOTS}")
        filled = "".join(_escape(text) + slots.get(slot or "", "") for text, slot, _, _ in parts)
    if [slot for _, slot, *_ in Formatter().parse(filled)].count("image") != 1 or filled.count("{image}") != 1:
        raise UserError(f"template {template!r} must contain {{image}} exactly once")
    return filled


def dialogue(
    turns: Sequence[tuple[str, str]], question: str, form: str, template: str, tokenizer: "PreTrainedTokenizerBase"
) -> str:
    """The text for `{prompt}` that asks a question after earlier questions and their answers.

    If the template continues after `{prompt}` as the tokenizer's chat template continues after a user's text, the chat
    template formats the turns of user and assistant, with the picture in the first. Otherwise they follow each other as
    in the authors' demo, "Question: {} Answer: {}. Question: {} Answer:", but with no second full stop.

    Args:
        turns: (question, answer) of each earlier turn.
        form: format of a question, where `{}` stands for the question.
        template: as returned by `resolve_template`.

    Raises:
        UserError: the chat template does not have a place for each turn.
    """
    turns = [(split_control_tokens(text, tokenizer), split_control_tokens(said, tokenizer)) for text, said in turns]
    question = split_control_tokens(question, tokenizer)
    asked = [form.replace("{}", text) for text in (*(text for text, _ in turns), question)]
    # White space before a question separates it from the picture, and only the first question follows the picture.
    *earlier, newest = asked[0], *(text.lstrip() for text in asked[1:])
    answered = [(text, answer) for text, (_, answer) in zip(earlier, turns, strict=True)]
    if turns and _takes_turns(template, tokenizer):
        return Turns(_between_turns(tokenizer, [*chain.from_iterable(answered), newest]))
    written = []
    for text, answer in answered:
        space = "" if not text or text[-1].isspace() else " "
        written.append(text + space + answer + ("" if answer.endswith((".", "!", "?")) else "."))
    return " ".join([*written, newest])


def _chat(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> str:
    """Applies the chat template to alternating texts of user and assistant, up to the start of the assistant's reply.

    Thinking is disabled, because otherwise all 30 tokens of a caption, generated or in training, would be thoughts.
    """
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    options: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": False, "thinking": False}
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except Exception as error:  # a template is third-party code, which may raise any exception
        raise UserError(
            f"this tokenizer's chat template fails on a dialogue of length {len(texts)} ({one_line(error)}): set "
            f"language.template to another one, {PAPER_TEMPLATE!r} for example"
        ) from error
    if text.rstrip().endswith("<think>"):  # a model that always thinks: adds empty thoughts, as other templates do
        text = text.rstrip() + "\n\n</think>\n\n"
    return text


def _takes_turns(template: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    rest = template.rpartition("{prompt}")[2]
    if not rest or template.count("{prompt}") != 1 or not tokenizer.chat_template:
        return False
    return rest == _escape(_chat(tokenizer, ["<<0>>"]).rpartition("<<0>>")[2])


def _between_turns(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> str:
    """Joins the texts with what the chat template writes between them."""
    frame, written = _chat(tokenizer, [f"<<{n}>>" for n in range(len(texts))]), ""
    for n, text in enumerate(texts):
        before, found, frame = frame.partition(f"<<{n}>>")
        if not found:
            raise UserError(f"this tokenizer's chat template cannot write a dialogue of {len(texts)} texts")
        written += (before if n else "") + text
    return written


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
