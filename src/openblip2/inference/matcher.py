"""`Matcher`: a trained stage-1 model that scores how well sentences fit pictures.

Pictures are paths, PIL images or arrays (see `data/images.py`); lower-level modules work on tensors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from openblip2.data.images import Picture
from openblip2.data.text import BertTokens, clean_caption
from openblip2.errors import UserError
from openblip2.evaluate.ranking import rerank, similarities
from openblip2.hardware import computing
from openblip2.inference.inputs import (
    clean_texts,
    each_readable,
    features_of,
    require_pairs,
    require_readable,
    stacked,
    warn_unknown,
)
from openblip2.inference.pretrained import Compute, Pretrained, QueryFeatures
from openblip2.model.stage1 import Stage1


class Matcher(Pretrained):
    """A trained stage-1 model: it scores how well texts fit pictures."""

    model: Stage1
    tokens: BertTokens
    model_class = Stage1

    def similarity(self, images: Sequence[Picture], texts: Sequence[str]) -> Tensor:
        """Cosine similarity of N pictures and M texts, the maximum over the queries: `[N, M]`, in [-1, 1].

        The row of a picture that cannot be opened is NaN, with a warning.

        Raises:
            UserError: an empty text, or one longer than the run's text limit.
        """
        tokens, valid = self.tokenise(texts)
        return self._rows(images, lambda part, _: similarities(self.model, part, tokens, valid), len(texts))

    def match(self, images: Sequence[Picture], texts: Sequence[str]) -> Tensor:
        """The probability, by the image-text matching head, that text n belongs to picture n: `[N]`.

        It is NaN, with a warning, for a picture that cannot be opened.

        Raises:
            UserError: as for `similarity`; or the numbers of pictures and texts differ.
        """
        require_pairs(images, texts, "texts")
        tokens, valid = self.tokenise(texts)

        def score(features: Tensor, numbers: Sequence[int]) -> Tensor:
            logits = self.model.match(self.model.connector.encode_image(features), tokens[numbers], valid[numbers])
            return logits.float().softmax(dim=1)[:, 1]

        return self._rows(images, score)

    def features(self, images: Sequence[Picture], texts: Sequence[str] | None = None) -> QueryFeatures:
        """Query outputs for N pictures. The rows of a picture that cannot be opened are NaN, with a warning.

        Args:
            texts: one for each picture; if they are given, `joint` is also computed.

        Returns:
            `queries [N, Q, D]`; `projected [N, Q, E]`, unit vectors that `similarity` compares with texts; and
            `joint [N, Q, D]`, outputs of queries that also attend to the text, as in ITM. All are on the CPU.

        Raises:
            UserError: as for `match`.
        """
        if texts is not None:
            require_pairs(images, texts, "texts")
        read = None if texts is None else self.tokenise(texts)
        connector = self.model.connector

        def compute(features: Tensor, numbers: Sequence[int]) -> Tensor:
            queries = connector.query_output(features)
            outputs = [queries.float(), self.model.image_vectors(queries)]
            if read is not None:
                tokens, valid = (one[numbers] for one in read)
                outputs.append(connector.joint_pass(connector.encode_image(features), tokens, valid).float())
            return torch.cat(outputs, dim=2)

        sizes = [connector.width, self.model.vision_proj.out_features, connector.width][: 2 if read is None else 3]
        return QueryFeatures(*self._rows(images, compute, connector.tokens, sum(sizes)).split(sizes, dim=2))

    def embed_image(self, image: Picture) -> list[float]:
        """A unit vector of E numbers for a picture: the direction of the mean over its queries.
        Cosines with it are lower than those of `similarity`, which takes the maximum over the queries.

        Raises:
            UserError: the picture cannot be opened.
        """
        with torch.inference_mode(), computing(self.model, self.settings.train.precision):
            (features,) = features_of(self.model, [image])
            vectors = self.model.image_vectors(self.model.connector.query_output(features))
        return F.normalize(vectors.float().mean(dim=1), dim=-1)[0].tolist()

    def embed_text(self, text: str) -> list[float]:
        """A unit vector of E numbers for a text.

        Raises:
            UserError: an empty text, or one longer than the run's text limit.
        """
        tokens, valid = self.tokenise([text])
        with torch.inference_mode(), computing(self.model, self.settings.train.precision):
            return self.model.text_vectors(tokens, valid)[0].float().tolist()

    def rerank(self, images: Sequence[Picture], texts: Sequence[str], best: int = 128) -> tuple[Tensor, Tensor]:
        """Scores of N pictures and M texts, re-ranked as in the paper's retrieval: two tensors `[N, M]`.

        The first ranks the texts of each picture, the second the pictures of each text. The `best` candidates by
        `similarity` get the log-odds of the matching head, and all others come after them. The features of all
        pictures are kept in memory. The rows of a picture that cannot be opened are NaN, with a warning.

        Raises:
            UserError: as for `similarity`.
        """
        tokens, valid = self.tokenise(texts)

        def score(some: Sequence[Picture], numbers: Sequence[int]) -> Tensor:
            with torch.inference_mode(), computing(self.model, self.settings.train.precision):
                features = torch.cat(list(features_of(self.model, some)))
                scores = similarities(self.model, features, tokens, valid)
                both = rerank(self.model, features, tokens, valid, scores, best)
            return torch.stack(both, dim=1).float().cpu()

        by_image, by_text = stacked(each_readable(images, score), 2, len(texts)).unbind(dim=1)
        return by_image, by_text

    def _query_output(self, count: int, questions: Sequence[str] | None) -> Compute:
        if questions is not None:
            raise UserError("a stage-1 run does not read questions: leave them out")
        return lambda features, _: self.model.connector.query_output(features)

    def tokenise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids of texts, `[M, T]` int64, and a mask of the real tokens, `[M, T]` bool, on the model's device.

        Raises:
            UserError: an empty text, or one longer than the run's text limit.
        """
        cleaned = clean_texts(texts, clean_caption)
        require_readable(self.tokens, cleaned)
        warn_unknown(self.tokens.tokenizer, cleaned)
        ids, valid = self.tokens(cleaned)
        return ids.to(self.model.temperature.device), valid.to(self.model.temperature.device)
