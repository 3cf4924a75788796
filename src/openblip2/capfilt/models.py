"""The captioner, and the rankers, which score how well each image's own captions fit it: a trained stage 1, or a CLIP.

The paper ranks with CLIP ViT-L/14.

Shapes: N images, M captions of all images, S image side, E shared space.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from openblip2.compat import quiet_transformers
from openblip2.config import RunSettings
from openblip2.data.images import PictureFile, open_picture, to_pixels
from openblip2.errors import UserError, one_line, refuse_lfs_pointer
from openblip2.evaluate.ranking import similarities
from openblip2.hardware import computing
from openblip2.hardware import device as default_device
from openblip2.inference.captioner import Captioner
from openblip2.inference.matcher import Matcher
from openblip2.model.precision import load_in
from openblip2.runs import read_json
from openblip2.weights.assemble import fetch_repository, read_checkpoint

_WEIGHTS = (".json", ".safetensors", ".txt", ".model")
CHUNK = 64  # number of texts, or of pairs for ITM, that are processed at once


class RunRanker:
    """Ranks with a trained stage 1.

    Args:
        matcher: the run.
        itm: rank by the probability of a match, in [0, 1], instead of the cosine of the best query, in [-1, 1].
    """

    def __init__(self, matcher: Matcher, itm: bool) -> None:
        assert matcher.model.vision is not None
        self.matcher, self.itm, self.vision = matcher, itm, matcher.model.vision

    def pixels(self, picture: PictureFile) -> Tensor:
        """The pixels of an image: `[3, S, S]` uint8.

        Raises:
            UserError: the image cannot be opened.
        """
        return to_pixels([picture], self.vision.image_size)[0]

    def scores(self, pixels: Sequence[Tensor], texts: Sequence[str], owners: Sequence[int]) -> list[float]:
        """The score of each text with its own image. A text that is too long is cut as in training.

        Args:
            pixels: of N images.
            texts: M cleaned captions, at least one.
            owners: the number of the image of each caption.
        """
        model, device = self.matcher.model, self.matcher.model.temperature.device
        own, pairs = torch.tensor(owners, device=device), torch.arange(len(owners), device=device)
        tokens, valid = (t.to(device) for t in self.matcher.tokens(texts))
        with torch.inference_mode(), computing(model, self.matcher.settings.train.precision):
            features = self.vision(torch.stack(list(pixels)).to(device))
            if not self.itm:
                return similarities(model, features, tokens, valid)[own, pairs].tolist()
            image = model.connector.encode_image(features)
            logits = [model.match(image.take(own[n]), tokens[n], valid[n]) for n in pairs.split(CHUNK)]
            return torch.cat(logits).float().softmax(dim=1)[:, 1].tolist()


class ClipRanker:
    """Ranks with CLIP or a similar model of transformers by the cosine of image and text in [-1, 1], in fp32.

    Args:
        folder: folder with the safetensors, tokenizer and preprocessing of the model, which does not need torchvision.

    Raises:
        UserError: a part is missing, or the model does not compare images with texts.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        refuse_lfs_pointer(folder)
        try:
            with quiet_transformers():
                model, report = load_in(AutoModel, str(folder), torch.float32, use_safetensors=True)
                # Uses Pillow: otherwise, torchvision would be used if it is installed.
                self.processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
                self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise UserError(f"ranker {folder} cannot be loaded: {one_line(error)}") from error
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise UserError(f"ranker {folder} is a {model.config.model_type!r}: it must be a CLIP or a stage-1 run")
        if missing := sorted(report["missing_keys"]):  # they would be random
            raise UserError(f"ranker {folder} cannot be loaded: {len(missing)} weights are missing, e.g. {missing[0]}")
        self.model: Any = model.to(default_device()).eval().requires_grad_(False)  # pyright: ignore
        self.longest: int = self.model.config.text_config.max_position_embeddings
        # SigLIP was trained on texts padded to the same length, and it reads the padding.
        self.padding = "max_length" if self.model.config.model_type.startswith("siglip") else True

    def pixels(self, picture: PictureFile) -> Tensor:
        """As `RunRanker.pixels`, but with the model's own preprocessing."""
        image = open_picture(picture)
        try:
            return self.processor(images=[image], return_tensors="pt")["pixel_values"][0]
        except ValueError as error:  # for example an image that is one pixel high
            raise UserError(f"{picture.name}: the ranker cannot read it ({one_line(error)})") from error

    def scores(self, pixels: Sequence[Tensor], texts: Sequence[str], owners: Sequence[int]) -> list[float]:
        """As `RunRanker.scores`. A text that is too long for the model is cut."""
        with torch.inference_mode():
            batch = torch.stack(list(pixels)).to(self.model.device)
            images = _directions(self.model.get_image_features(pixel_values=batch))
            parts = [self._texts(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)]
            return (images[list(owners)] * torch.cat(parts)).sum(dim=1).tolist()

    def _texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(texts),
            padding=self.padding,
            truncation=True,
            max_length=self.longest,
            split_special_tokens=True,  # "<|endoftext|>" in a caption is plain text
            return_tensors="pt",
        ).to(self.model.device)
        names = {"input_ids", "attention_mask"} & tokens.keys()
        return _directions(self.model.get_text_features(**{name: tokens[name] for name in names}))


Ranker = RunRanker | ClipRanker


def digest(values: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def digests(captioner: str, ranker: str, itm: bool) -> dict[str, str]:
    """Digests of captioner and ranker: their weights and everything else that their results depend on.

    Raises:
        UserError: a model does not exist, is of the wrong kind, or cannot do what the settings require.
    """
    settings = read_checkpoint(captioner).settings
    if settings.stage == "stage1":
        raise UserError(f"--captioner {captioner} is a stage-1 run, which cannot write text; give a stage-2 run")
    if settings.reads_text and not settings.reads_prompts:
        raise UserError(f"--captioner {captioner} answers questions; give a run that writes captions")
    found = {"captioner": _of_run(captioner, settings)}
    if _is_other(ranker):
        if itm:
            raise UserError(f"--ranker {ranker} is not a run of openblip2: --filter itm needs a stage-1 run")
        if not {"text_config", "vision_config"} <= read_json(_folder(ranker) / "config.json").keys():
            raise UserError(f"--ranker {ranker} does not compare pictures with texts: give a stage-1 run or a CLIP")
        return found | {"ranker": _of_model(_folder(ranker))}
    settings = read_checkpoint(ranker).settings
    if settings.stage != "stage1":
        raise UserError(f"--ranker {ranker} is a stage-2 run, which cannot rank; give a stage-1 run or a CLIP")
    return found | {"ranker": _of_run(ranker, settings)}


def open_models(captioner: str, ranker: str, itm: bool) -> tuple[Captioner, Ranker]:
    """Loads both models, on a GPU if there is one; arguments as in `digests`, which has checked them."""
    writer = Captioner.from_pretrained(captioner)
    if _is_other(ranker):
        return writer, ClipRanker(_folder(ranker))
    return writer, RunRanker(Matcher.from_pretrained(ranker), itm)


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    return path if path.exists() else fetch_repository(name)


def _is_other(name: str) -> bool:
    """Whether `name` is a model of transformers that `read_checkpoint` does not read, for example a CLIP."""
    path = _folder(name) / "config.json"
    config = read_json(path) if path.is_file() else {}
    return isinstance(config, dict) and "model_type" in config and config["model_type"] != "blip-2"


def _of_run(name: str, settings: RunSettings) -> str:
    """A digest of the weights and settings of a run, and of its frozen models if they are in local folders."""
    run = _folder(name)
    files = [run] if run.is_file() else [run / "config.json", *sorted(run.glob("*.safetensors"))]
    frozen = [Path(part.name) for part in (settings.vision, settings.language)]
    return digest([_of_files(files), *(_of_model(folder) for folder in frozen if folder.is_dir())])


def _of_model(folder: Path) -> str:
    """A digest of a model of transformers, with its tokenizer and its preprocessing."""
    return _of_files(sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS))


def _of_files(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _directions(output: Any) -> Tensor:
    """The features `[N, E]` in an output of transformers, normalized to length 1."""
    return F.normalize(output.pooler_output.float(), dim=-1)
