"""Rankers, which score how well each image's own captions fit it: a trained stage 1, or a CLIP.

The paper ranks with CLIP ViT-L/14.

Shapes: N images, M captions of all of them, S image side, E shared space.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from openblip2.compat import quiet_transformers
from openblip2.data.images import PictureFile, open_picture, to_pixels
from openblip2.errors import UserError, one_line
from openblip2.evaluate.ranking import text_vectors
from openblip2.hardware import computing, device
from openblip2.inference.matcher import Matcher
from openblip2.model.mapped import load_in
from openblip2.model.objectives import similarity

CHUNK = 64  # texts, or pairs for ITM, at once


class RunRanker:
    """Ranks with a trained stage 1.

    Args:
        matcher: the run.
        itm: rank by the probability of a match, in [0, 1], and not by the cosine of the best query, in [-1, 1].
    """

    def __init__(self, matcher: Matcher, itm: bool = False) -> None:
        self.matcher, self.itm = matcher, itm

    def look(self, picture: PictureFile) -> Tensor:
        """The pixels of an image: `[3, S, S]` uint8.

        Raises:
            UserError: the image cannot be opened.
        """
        vision = self.matcher.model.vision
        assert vision is not None
        return to_pixels([picture], vision.image_size)[0]

    def scores(self, looks: Sequence[Tensor], pools: Sequence[Sequence[str]]) -> list[list[float]]:
        """The scores of each image's own captions. A text that is too long is cut as in training.

        Args:
            looks: N images.
            pools: the cleaned captions of each image, at least one.
        """
        model = self.matcher.model
        assert model.vision is not None
        place = model.temperature.device
        owners = _owners(pools, place)
        tokens, valid = (t.to(place) for t in self.matcher.tokens([text for texts in pools for text in texts]))
        with torch.inference_mode(), computing(model, self.matcher.settings.train.precision):
            memory = model.connector.encode_image(model.vision(torch.stack(list(looks)).to(place)))
            if self.itm:
                logits = [
                    model.match(memory.take(owners[rows]), tokens[rows], valid[rows])
                    for rows in torch.arange(len(owners), device=place).split(CHUNK)
                ]
                found = torch.cat(logits).float().softmax(dim=1)[:, 1]
            else:
                every = similarity(
                    model.image_vectors(model.connector.query_pass(memory)[0]), text_vectors(model, tokens, valid)
                )
                found = every[owners, torch.arange(len(owners), device=place)]
        return _split(found, pools)


class ClipRanker:
    """Ranks with a CLIP of transformers, or a model like it, by the cosine of image and text in [-1, 1], in fp32.

    Args:
        folder: of the model with safetensors, its tokenizer and its preprocessing, which does not need torchvision.

    Raises:
        UserError: a part is missing, or the model does not compare images with texts.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        try:
            with quiet_transformers():
                model, report = load_in(AutoModel, str(folder), torch.float32, use_safetensors=True)
                # With Pillow: where torchvision is installed, it would be used otherwise.
                self.processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
                self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise UserError(f"ranker {folder} cannot be loaded: {one_line(error)}") from error
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise UserError(f"ranker {folder} is a {model.config.model_type!r}; a CLIP, or a stage-1 run")
        if missing := sorted(report["missing_keys"]):  # drawn at random
            raise UserError(f"ranker {folder} cannot be loaded: {len(missing)} weights are not in it, {missing[0]}")
        self.model: Any = model.to(device()).eval().requires_grad_(False)  # pyright: ignore
        self.longest: int = self.model.config.text_config.max_position_embeddings
        # SigLIP was trained on texts padded to the same length, and it reads the padding.
        self.padding = "max_length" if self.model.config.model_type.startswith("siglip") else True

    def look(self, picture: PictureFile) -> Tensor:
        """The pixels of an image: `[3, S, S]`.

        Raises:
            UserError: the image cannot be opened.
        """
        image = open_picture(picture)
        try:
            return self.processor(images=[image], return_tensors="pt")["pixel_values"][0]
        except ValueError as error:  # for example an image that is one pixel high
            raise UserError(f"{picture.name}: the ranker cannot look at it ({one_line(error)}); a picture") from error

    def scores(self, looks: Sequence[Tensor], pools: Sequence[Sequence[str]]) -> list[list[float]]:
        """As `RunRanker.scores`. A text that is too long for the model is cut."""
        place = self.model.device
        texts = [text for own in pools for text in own]
        owners = _owners(pools, place)
        with torch.inference_mode():
            images = _directions(self.model.get_image_features(pixel_values=torch.stack(list(looks)).to(place)))
            parts = [self._texts(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)]
            return _split((images[owners] * torch.cat(parts)).sum(dim=1), pools)

    def _texts(self, texts: list[str]) -> Tensor:
        found = self.tokenizer(
            texts,
            padding=self.padding,
            truncation=True,
            max_length=self.longest,
            split_special_tokens=True,  # "<|endoftext|>" in a caption is text
            return_tensors="pt",
        ).to(self.model.device)
        names = {"input_ids", "attention_mask"} & found.keys()
        return _directions(self.model.get_text_features(**{name: found[name] for name in names}))


def _owners(pools: Sequence[Sequence[str]], place: torch.device) -> Tensor:
    """The number of the image of each caption: `[M]`."""
    return torch.tensor([n for n, texts in enumerate(pools) for _ in texts], device=place)


def _split(scores: Tensor, pools: Sequence[Sequence[str]]) -> list[list[float]]:
    """Scores `[M]` by image."""
    return [part.tolist() for part in scores.float().cpu().split([len(texts) for texts in pools])]


def _directions(found: Any) -> Tensor:
    """`[N, E]` of length 1. From transformers 5 on, the features are in an object."""
    return F.normalize((found if isinstance(found, Tensor) else found.pooler_output).float(), dim=-1)
