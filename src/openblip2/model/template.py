"""The text around the soft visual prompt: one string with the slots `{image}`, `{prompt}` and `{bos}`.

`{image}` is where the soft prompt goes, `{prompt}` the user's text, `{bos}` the tokenizer's first token. The paper's
is `{image}{bos}{prompt}`; `chat` makes one from the tokenizer's chat template. A question, alone or after others and
their answers, is the text in the `{prompt}` of any of them: `dialogue` writes it.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from string import Formatter
from typing import TYPE_CHECKING

from openblip2.errors import UserError, one_line, require_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAPER_TEMPLATE = "{image}{bos}{prompt}"
_LIKE_A_CONTROL_TOKEN = re.compile(r"<.+>|\[.+\]")
SLOTS = "{image}, {prompt} and {bos}"


class Turns(str):
    """A prompt whose control tokens are a chat template's own, and remain what they are."""


def split_control_tokens(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A user's text that no longer contains control tokens: "</s>" becomes "< /s>", which is read as plain text."""
    require_unicode(text)
    if isinstance(text, Turns):
        return text
    pattern = _control_tokens(tokenizer)
    while pattern.search(text):  # what is left of one may contain another
        text = pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
    return text


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    added = tokenizer.added_tokens_decoder.values()
    # Some tokenizers do not mark all of theirs as special: Qwen3's <think>, for one.
    texts = {one.content for one in added if one.special or _LIKE_A_CONTROL_TOKEN.fullmatch(one.content)}
    longest_first = sorted((text for text in texts if len(text.strip()) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)", re.IGNORECASE)


def resolve_template(template: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The template with `{bos}` filled in, or, for `chat`, one made from the tokenizer's chat template.

    Braces of the text itself are doubled in both.

    Raises:
        UserError: a slot is unknown, `{image}` is not in it exactly once, or there is no chat template.
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


def dialogue(
    turns: Sequence[tuple[str, str]], question: str, form: str, template: str, tokenizer: "PreTrainedTokenizerBase"
) -> str:
    """The text in `{prompt}` that asks a question after earlier questions and their answers; the last is open.

    Where the template goes on after `{prompt}` as the tokenizer's chat template does after a user's text, the turns
    are the user's and the assistant's by that chat template, and the picture is in the first one. Everywhere else they
    stand one after the other, as in the authors' demo: "Question: {} Answer: {}. Question: {} Answer:". Differs from
    the demo where an answer ends a sentence itself: no second full stop.

    Args:
        turns: (question, answer) of each earlier one.
        form: how each question is put, `{}` being it.
        template: as `resolve_template` gives it.

    Raises:
        UserError: a chat template without a place for each turn.
    """
    turns = [(split_control_tokens(text, tokenizer), split_control_tokens(said, tokenizer)) for text, said in turns]
    question = split_control_tokens(question, tokenizer)
    asked = [form.replace("{}", text) for text in (*(text for text, _ in turns), question)]
    # White space in front of a question parts it from the picture, and only the first question comes right after it.
    *earlier, newest = asked[0], *(text.lstrip() for text in asked[1:])
    answered = [(text, answer) for text, (_, answer) in zip(earlier, turns, strict=True)]
    if turns and _takes_turns(template, tokenizer):
        return Turns(_between_turns(tokenizer, [*chain.from_iterable(answered), newest]))
    return " ".join([*(_spaced(text, answer) + _full_stop(answer) for text, answer in answered), newest])


def _chat_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    if not tokenizer.chat_template:
        raise UserError(f"template 'chat': this tokenizer has no chat template; use {PAPER_TEMPLATE!r}")
    text = _chat(tokenizer, ["<<image>><<prompt>>"])
    return _escape(text).replace("<<image>>", "{image}").replace("<<prompt>>", "{prompt}")


def _chat(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> str:
    """The chat template around texts of the user and the assistant in turn, up to where the assistant writes.

    Thinking is off: a caption of 30 tokens would be all thoughts, and one that is trained would be one of them.
    """
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    try:
        text = str(
            tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, enable_thinking=False, thinking=False
            )
        )
    except Exception as error:  # a template is a program of others, which may raise anything
        raise UserError(
            f"this tokenizer's chat template fails on a dialogue of length {len(texts)} ({one_line(error)}): set "
            f"language.template to another one, {PAPER_TEMPLATE!r} for example"
        ) from error
    if text.rstrip().endswith("<think>"):  # of models that always think: no thoughts, as other templates write it
        text = text.rstrip() + "\n\n</think>\n\n"
    return text


def _takes_turns(template: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    rest = template.rpartition("{prompt}")[2]
    if not rest or template.count("{prompt}") != 1 or not tokenizer.chat_template:
        return False
    return rest == _escape(_chat(tokenizer, ["<<0>>"]).rpartition("<<0>>")[2])


def _between_turns(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> str:
    """The texts, and between each two what the chat template writes there."""
    frame, written = _chat(tokenizer, [f"<<{n}>>" for n in range(len(texts))]), ""
    for n, text in enumerate(texts):
        before, found, frame = frame.partition(f"<<{n}>>")
        if not found:
            raise UserError(f"this tokenizer's chat template cannot hold {len(texts)} texts in turn")
        written += (before if n else "") + text
    return written


def _spaced(text: str, answer: str) -> str:
    return text + ("" if not text or text[-1].isspace() else " ") + answer


def _full_stop(answer: str) -> str:
    return "" if answer.endswith((".", "!", "?")) else "."


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
