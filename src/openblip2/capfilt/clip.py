"""CLIP as ranker, or any model of transformers that is made like it: the paper ranks by CLIP ViT-L/14.

It is read from safetensors, and sees pictures as its own preprocessing makes them; torchvision is not needed.

Shapes: N pictures, M captions of all of them, E shared space.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from openblip2.capfilt.ranker import by_picture
from openblip2.data.images import PictureFile, open_picture
from openblip2.errors import UserError, one_line
from openblip2.hardware import device
from openblip2.model.mapped import load_in
from openblip2.model.quiet import quiet_transformers

CHUNK = 64  # texts at once


class ClipRanker:
    """Ranks by the cosine of a picture and a text in [-1, 1], in fp32.

    Args:
        folder: with the model, its tokenizer and its preprocessing.

    Raises:
        UserError: something of it is missing, or it does not compare pictures with texts.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        try:
            with quiet_transformers():
                model, report = load_in(AutoModel, str(folder), torch.float32, use_safetensors=True)
                # Its own preprocessing, by Pillow: "torchvision" would be asked for where it is installed.
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
        # SigLIP was trained on texts that are all padded to the longest, and reads the padding.
        self.padding = "max_length" if self.model.config.model_type.startswith("siglip") else True

    def look(self, picture: PictureFile) -> Tensor:
        """What it sees of a picture, `[3, S, S]`.

        Raises:
            UserError: the picture cannot be opened.
        """
        image = open_picture(picture)
        try:
            return self.processor(images=[image], return_tensors="pt")["pixel_values"][0]
        except ValueError as error:  # a picture one pixel high, for one, of which nothing is left
            raise UserError(f"{picture.name}: the ranker cannot look at it ({one_line(error)}); a picture") from error

    def scores(self, looks: Sequence[Tensor], pools: Sequence[Sequence[str]]) -> list[list[float]]:
        """The scores of each picture's own captions. A picture and a text are encoded once.

        A text beyond the model's longest is cut.

        Args:
            looks: N pictures. pools: the captions of each, cleaned; one at least.
        """
        place = self.model.device
        texts = [text for own in pools for text in own]
        owners = torch.tensor([n for n, own in enumerate(pools) for _ in own], device=place)
        with torch.inference_mode():
            images = _directions(self.model.get_image_features(pixel_values=torch.stack(list(looks)).to(place)))
            parts = [self._texts(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)]
            return by_picture((images[owners] * torch.cat(parts)).sum(dim=1), pools)

    def _texts(self, texts: list[str]) -> Tensor:
        found = self.tokenizer(
            texts,
            padding=self.padding,
            truncation=True,
            max_length=self.longest,
            split_special_tokens=True,  # a caption with "<|endoftext|>" in it is read to its end
            return_tensors="pt",
        ).to(self.model.device)
        names = {"input_ids", "attention_mask"} & found.keys()
        return _directions(self.model.get_text_features(**{name: found[name] for name in names}))


def _directions(found: Any) -> Tensor:
    """`[N, E]` of length 1. From transformers 5 on the features stand in an object."""
    return F.normalize((found if isinstance(found, Tensor) else found.pooler_output).float(), dim=-1)
