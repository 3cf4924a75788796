"""How much a language model takes at once: what it reads, and of a decoder what it writes after that.

Shapes: Q queries.
"""

from openblip2.compat import unlimited_length
from openblip2.errors import UserError
from openblip2.model.language import LanguageModel


def context_of(language: LanguageModel) -> int | None:
    """The most tokens that it takes at once, soft ones counted; None where nothing says so.

    By its configuration, or where that knows no limit (T5 tells places by distance) by its tokenizer.
    """
    places = getattr(language.llm.config.get_text_config(), "max_position_embeddings", None)
    if places is not None and places > 0:
        return places
    most = language.tokenizer.model_max_length
    return None if most >= unlimited_length() else most


def room_for_prompt(language: LanguageModel, context: int | None, queries: int, new: int) -> int | None:
    """How long a prompt may be, as `language.length` counts it; may be negative; None = however long.

    Args:
        context: tokens that fit at once.
        queries: Q, soft tokens beside it.
        new: tokens that are to be written. An encoder-decoder writes them elsewhere.
    """
    if context is None:
        return None
    return context - queries - (0 if language.llm.config.is_encoder_decoder else new)


def require_room(language: LanguageModel, prompt: str, queries: int, new: int) -> None:
    """Raises `UserError` if a prompt, Q soft tokens and `new` tokens do not fit the language model at once."""
    context, length = context_of(language), language.length(prompt)
    room = room_for_prompt(language, context, queries, new)
    if room is not None and length > room:
        raise UserError(
            f"prompt {prompt[:40]!r}: it has {length} tokens, but the language model takes {context} at once, with "
            f"{queries} of the picture and up to {new} new ones: write a shorter prompt, or ask for fewer new tokens"
        )
