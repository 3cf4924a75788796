"""A stage 1 as ranker: how well each picture's own captions fit it.

Shapes: N pictures, M captions of all of them, S image side, P patch tokens, V encoder width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from openblip2.data.images import PictureFile, to_pixels
from openblip2.evaluate.ranking import text_vectors
from openblip2.hardware import computing
from openblip2.matcher import Matcher
from openblip2.model.objectives import similarity

CHUNK = 64  # pairs that ITM looks at at once


class RunRanker:
    """Ranks by a trained stage 1.

    Args:
        itm: by the probability of a match, in [0, 1]; else by the best query's cosine, in [-1, 1].
    """

    def __init__(self, matcher: Matcher, itm: bool = False) -> None:
        self.matcher, self.itm = matcher, itm

    def look(self, picture: PictureFile) -> Tensor:
        """What it sees of a picture: `[3, S, S]`, uint8.

        Raises:
            UserError: the picture cannot be opened.
        """
        vision = self.matcher.model.vision
        assert vision is not None
        return to_pixels([picture], vision.image_size)[0]

    def scores(self, looks: Sequence[Tensor], pools: Sequence[Sequence[str]]) -> list[list[float]]:
        """The scores of each picture's own captions. A picture and a text are encoded once.

        A text beyond the run's longest is cut as in training.

        Args:
            looks: N pictures.
            pools: the captions of each, cleaned; one at least.
        """
        model = self.matcher.model
        assert model.vision is not None
        place = model.temperature.device
        owners = torch.tensor([n for n, texts in enumerate(pools) for _ in texts], device=place)
        tokens, valid = (t.to(place) for t in self.matcher.tokens([text for texts in pools for text in texts]))
        with torch.inference_mode(), computing(model, self.matcher.settings.train.precision):
            memory = model.qformer.encode_image(model.vision(torch.stack(list(looks)).to(place)))
            if self.itm:
                logits = [
                    model.match(memory.take(owners[rows]), tokens[rows], valid[rows])
                    for rows in torch.arange(len(owners), device=place).split(CHUNK)
                ]
                found = torch.cat(logits).float().softmax(dim=1)[:, 1]
            else:
                every = similarity(
                    model.image_vectors(model.qformer.query_pass(memory)[0]), text_vectors(model, tokens, valid)
                )
                found = every[owners, torch.arange(len(owners), device=place)]
        return by_picture(found, pools)


def by_picture(scores: Tensor, pools: Sequence[Sequence[str]]) -> list[list[float]]:
    """Scores `[M]` of all captions as those of each picture."""
    return [part.tolist() for part in scores.float().cpu().split([len(texts) for texts in pools])]
