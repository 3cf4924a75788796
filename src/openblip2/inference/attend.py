"""Where a trained model looks, as maps over pictures and as pictures of their own.

Attention is what the queries look at; relevance is what a text's score depends on: how well it fits the
picture by contrast (ITC) or by matching (ITM), or how likely the language model finds each of its words.

Shapes: B images, Q queries, H heads, P patch tokens, g patches along a side.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from openblip2.data.images import Picture, open_picture, to_pixels
from openblip2.data.text import clean_caption, question_tokens
from openblip2.errors import UserError
from openblip2.hardware import computing
from openblip2.inference.captioner import ANSWER, CAPTION, Captioner
from openblip2.inference.inputs import clean_texts
from openblip2.inference.matcher import Matcher
from openblip2.model.likelihood import word_scores
from openblip2.model.qformer import Layer, QFormer
from openblip2.model.vision import FrozenVision

By = Literal["itc", "itm"]
BY: tuple[By, ...] = get_args(By)
# float32 [g, g], 0 or more, from the top left; it covers the whole picture, at any aspect ratio.
Map = np.ndarray[Any, Any]
SIDE = 768  # px, longest of what is drawn


@dataclass(frozen=True)
class Looked:
    """What was found for one picture.

    Attributes:
        queries: `[Q, g, g]`, how much each query looks at each patch; a query's shares sum to 1, less what it looks at
            class and register tokens.
        text: what the maps of `words` belong to: what was given, or what the model wrote.
        words: of a stage 1 one map for the whole text, of a stage 2 one for each word; None without a text.
    """

    queries: np.ndarray[Any, Any]
    text: str | None
    words: tuple[tuple[str, Map], ...]

    @property
    def average(self) -> Map:
        """Of all queries."""
        return self.queries.mean(axis=0)


def look(model: Matcher | Captioner, picture: Picture, text: str | None = None, by: By = "itc") -> Looked:
    """Where the queries look in a picture, and which parts of it a text's score depends on.

    Args:
        text: of a stage 1: a sentence about the picture; None = attention alone. Of a stage 2: the text whose words
            are explained; None = the caption that it writes. Where the Q-Former reads questions, the question, and its
            answer is what is explained.
        by: of a stage 1, which score of the text.

    Raises:
        UserError: a picture that cannot be opened, an empty or too long text, a question that is missing, another
            connector than the Q-Former.
    """
    vision, connector = model.model.vision, model.model.connector
    assert vision is not None
    if not isinstance(connector, QFormer):
        raise UserError(f"the connector {connector.name!r} has no attention maps: give a run with a Q-Former")
    place = next(model.model.parameters()).device
    with torch.enable_grad(), computing(model.model, model.settings.train.precision):
        with torch.no_grad():
            features = vision(to_pixels([picture], vision.image_size).to(place))
        if isinstance(model, Matcher):
            return _of_matcher(model, vision, features, text, by)
        return _of_captioner(model, vision, features, picture, text)


def text_relevance(model: Matcher, features: Tensor, texts: Sequence[str], by: By = "itc") -> np.ndarray[Any, Any]:
    """What the score of text n depends on in picture n: `[B, g, g]`; `features [B, P, V]`."""
    assert model.model.vision is not None
    weights, score = _scored(model, features, texts, by)
    return _maps(model.model.vision, relevance(score, weights))


def _of_matcher(model: Matcher, vision: FrozenVision, features: Tensor, text: str | None, by: By) -> Looked:
    with torch.no_grad(), watching(model.model.qformer) as weights:
        model.model.qformer.query_output(features)
    queries = _maps(vision, attention(weights)[0])
    if text is None:
        return Looked(queries, None, ())
    return Looked(queries, text, ((text, text_relevance(model, features, [text], by)[0]),))


def _scored(model: Matcher, features: Tensor, texts: Sequence[str], by: By) -> tuple[list[Tensor], Tensor]:
    stage1 = model.model
    tokens, valid = (t.to(features.device) for t in model.tokenise(texts))
    with torch.no_grad():
        vectors = stage1.text_vectors(tokens, valid)
    with watching(stage1.qformer) as weights:
        memory = stage1.qformer.encode_image(features)
        if by == "itc":  # of the query that fits best, as the similarity is
            cosines = (stage1.image_vectors(stage1.qformer.query_pass(memory)[0]) @ vectors.unsqueeze(-1)).squeeze(-1)
            return weights, cosines.max(dim=1).values.sum()
        logits = stage1.match(memory, tokens, valid).float()
        return weights, (logits[:, 1] - logits[:, 0]).sum()


def _of_captioner(
    model: Captioner, vision: FrozenVision, features: Tensor, picture: Picture, text: str | None
) -> Looked:
    stage2, language = model.model, model.settings.language
    prompt, question = language.prompts[0], None
    if model.tokens is not None:
        if text is None and not model.settings.reads_prompts:
            raise UserError("this run's Q-Former reads questions: give one as the text")
        (prompt,), asked = ([prompt], [prompt]) if text is None else model.read_questions([text])
        question = question_tokens(model.tokens, asked, features.device)
        (text,) = model.generate([picture], [prompt], CAPTION if text is None else ANSWER, asked)
    elif text is None:
        (text,) = model.generate([picture], [prompt], CAPTION)
    else:
        (text,) = clean_texts([text], clean_caption)
    assert isinstance(stage2.connector, QFormer)
    with watching(stage2.connector) as weights:
        soft = stage2.soft_prompt(features=features, question=question)
        words = word_scores(stage2.language, soft, prompt, text) if text else []
    found = tuple((word, _maps(vision, relevance(score, weights))[0]) for word, score in words)
    return Looked(_maps(vision, attention(weights)[0]), text, found)


def _maps(vision: FrozenVision, patches: Tensor) -> np.ndarray[Any, Any]:
    """`[n, P]` -> `[n, g, g]`; class and register tokens, which come first, are left out."""
    side = vision.grid
    return patches[:, -side * side :].unflatten(1, (side, side)).float().cpu().numpy()


@contextmanager
def watching(qformer: QFormer) -> Iterator[list[Tensor]]:
    """Inside it each pass over images adds its cross-attention weights, `[B, H, Q, P]` for each crossing layer.

    Each row sums to 1. Where gradients are on, the pass goes through them. No dropout is applied to them.
    """
    crossing = [layer.cross for layer in qformer.layers if isinstance(layer, Layer) and layer.cross is not None]
    found: list[Tensor] = []
    for cross in crossing:
        cross.watched = found
    try:
        yield found
    finally:
        for cross in crossing:
            cross.watched = None


def attention(weights: Sequence[Tensor]) -> Tensor:
    """How much each query looks at each patch: `[B, Q, P]`, the mean over layers and heads; rows sum to 1."""
    return torch.stack([layer.detach().mean(dim=1) for layer in weights]).mean(dim=0)


def relevance(score: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """How much more the score would be if the queries looked more at a patch, and as much less elsewhere: `[B, P]`.

    Weight times gradient, as Grad-CAM has it for attention (Chefer et al., 2021), the gradient less its mean over the
    patches that are looked at: weights sum to 1, so one cannot grow alone. Summed over layers, heads and queries, and
    of what speaks against a patch nothing is taken off.

    Args:
        score: one number, the sum over B images of scores that depend on their own image alone. It may be asked
            again about another score of the same pass.
        weights: of that pass, as `watching` collects them.
    """
    found: list[Tensor] = []
    for weight, gradient in zip(weights, torch.autograd.grad(score, list(weights), retain_graph=True), strict=True):
        more = gradient - (weight * gradient).sum(dim=-1, keepdim=True)
        found.append((weight * more.clamp(min=0)).sum(dim=(1, 2)))
    return torch.stack(found).sum(dim=0).detach()


# Drawn over the picture, from nothing to the most: see-through, then violet, red, yellow. Distinguishable without
# colour vision, for it grows brighter all the way.
_COLOURS = np.array([(0, 0, 40), (90, 20, 110), (190, 55, 85), (245, 125, 20), (252, 255, 164)], np.float32)


def overlay(picture: Picture, found: Map, most: float | None = None, side: int = SIDE) -> Image.Image:
    """A picture with a map drawn over it; of its own aspect, `side` px the longer way at most.

    Args:
        most: what is drawn brightest; None = the map's own largest value.
    """
    image = open_picture(picture)
    image.thumbnail((side, side))
    top = float(found.max()) if most is None else most
    heat = Image.fromarray(np.clip(found / top if top > 0 else found * 0, 0, 1).astype(np.float32))
    values = np.clip(np.asarray(heat.resize(image.size, Image.Resampling.BICUBIC)), 0, 1)
    steps = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(values, steps, channel) for channel in _COLOURS.T], axis=-1)
    share = (0.25 + 0.5 * values)[..., None]
    return Image.fromarray((np.asarray(image) * (1 - share) + colours * share).round().astype(np.uint8))


def sheet(
    picture: Picture, maps: Sequence[tuple[str, Map]], side: int = 160, columns: int = 8, one_scale: bool = True
) -> Image.Image:
    """Many maps of one picture beside each other, each with its name beneath.

    Args:
        one_scale: a map that is brighter has larger values; False: each is drawn to its own scale.
    """
    most = max((float(found.max()) for _, found in maps), default=0.0) if one_scale else None
    shots = [overlay(picture, found, most, side) for _, found in maps]
    wide, high = shots[0].width + 8, shots[0].height + 20
    columns = min(columns, len(shots))
    canvas = Image.new("RGB", (columns * wide, math.ceil(len(shots) / columns) * high), "white")
    draw = ImageDraw.Draw(canvas)
    for n, (shot, (name, _)) in enumerate(zip(shots, maps, strict=True)):
        left, top = n % columns * wide + 4, n // columns * high + 4
        canvas.paste(shot, (left, top))
        draw.text((left, top + shot.height + 2), name, fill="black")
    return canvas
