"""Captions compared with reference captions by people: BLEU, METEOR, ROUGE-L, CIDEr-D and SPICE.

The scorers are pycocoevalcap's, with which published results on COCO and NoCaps are computed. Scores are in [0, 1],
CIDEr-D's in [0, 10]; papers print all of them times 100.

What is odd about the reference is kept: "CIDEr" there is CIDEr-D; CIDEr-D weights n-grams by how rare they are among
the references of the scored images, so that a single image scores 0 and a part of a data set scores differently than
the whole; an empty caption and an empty reference are a match for ROUGE-L and not for the others.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from subprocess import CalledProcessError
from typing import Any

import numpy as np

from openblip2.errors import UserError, one_line, require
from openblip2.evaluate.ptb import reference_folder, tokenise, why_no_jar

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")  # the names of BLEU's four scores
Texts = Mapping[int, list[str]]  # by image


@dataclass(frozen=True)
class Tokenised:
    """Captions and references as tokens, one entry per image.

    Attributes:
        by: the tokeniser.
    """

    captions: list[str]
    references: list[list[str]]
    by: str


@dataclass(frozen=True)
class CaptionScores:
    """Scores of n captions.

    Attributes:
        corpus: of all captions together; BLEU and METEOR are not the mean of the samples.
        samples: of each image, [n].
        missing: what was not measured, and why.
    """

    corpus: dict[str, float]
    samples: dict[str, np.ndarray]
    missing: dict[str, str]


def tokenise_all(captions: Sequence[str], references: Sequence[Sequence[str]], jar: bool = True) -> Tokenised:
    """Tokens of one caption and at least one reference per image, for `caption_scores`; `jar` as in `tokenise`.

    Raises:
        UserError: there is nothing to score, the numbers of captions and reference lists differ, or an image has no
            reference.
    """
    if not captions or len(captions) != len(references):
        raise UserError(f"{len(captions)} captions and {len(references)} lists of references: give equally many")
    without = next((n for n, given in enumerate(references) if not given), None)
    if without is not None:
        raise UserError(f"picture {without} has no reference caption: at least one is needed")
    ours, by = tokenise(captions, jar)
    theirs = iter(tokenise([caption for given in references for caption in given], jar)[0])
    return Tokenised(ours, [[next(theirs) for _ in given] for given in references], by)


def caption_scores(tokens: Tokenised, wanted: Sequence[str] | None = None) -> CaptionScores:
    """Scores of captions that `tokenise_all` returned.

    METEOR and SPICE are not measured, and `missing` says why, if there is no Java, if SPICE's language models (1 GB)
    have not been downloaded, or if Java fails.

    Args:
        tokens: captions and references.
        wanted: names of `METRICS`; None = all. METEOR takes 10 s to start, SPICE minutes.

    Raises:
        UserError: an unknown metric, or pycocoevalcap is not installed.
    """
    wanted = METRICS if wanted is None else wanted
    unknown = [name for name in wanted if name not in METRICS]
    if unknown:
        raise UserError(f"there is no metric {unknown[0]!r}: it must be one of {', '.join(METRICS)}")
    require("scoring captions", "eval", "pycocoevalcap")
    references = dict(enumerate(tokens.references))
    captions = {n: [caption] for n, caption in enumerate(tokens.captions)}
    found = CaptionScores({}, {}, {})
    for name in wanted:
        in_java = name not in FAST
        if in_java and (reason := _why_not(name)):
            found.missing[name] = reason
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                corpus, samples = _SCORERS[name](references, captions)
        except (CalledProcessError, OSError, ValueError) as error:  # a Java that ended returns no number
            if not in_java:
                raise
            found.missing[name] = f"{name} failed in Java: {one_line(error)}"
            continue
        several = zip(BLEU, corpus, samples, strict=True) if name == "BLEU" else [(name, corpus, samples)]
        for one, of_all, of_each in several:
            found.corpus[one], found.samples[one] = float(of_all), np.asarray(of_each, dtype=np.float64)
    return found


def bleu_counts(tokens: Tokenised) -> np.ndarray:
    """What each image adds to corpus BLEU, [n, 10]: matches and n-grams of 1 to 4 tokens, tokens, reference tokens.

    With `bleu` as the score of `intervals.interval`.
    """
    require("BLEU", "eval", "pycocoevalcap")
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for caption, given in zip(tokens.captions, tokens.references, strict=True):
        scorer += (caption, given)
    closest = [min((abs(length - one["testlen"]), length) for length in one["reflen"])[1] for one in scorer.ctest]
    rows = zip(scorer.ctest, closest, strict=True)
    return np.array(
        [[*one["correct"], *one["guess"], one["testlen"], length] for one, length in rows], dtype=np.float64
    )


def bleu(sums: np.ndarray, order: int = 4) -> np.ndarray:
    """BLEU-`order` of sums of `bleu_counts`: `[draws, 10]` -> [draws] in [0, 1]."""
    correct, said, (ours, theirs) = sums[:, :order], sums[:, 4 : 4 + order], sums[:, 8:].T
    tiny, small = 1e-15, 1e-9  # the reference's guards against zero
    precision = np.prod((correct + tiny) / (said + small), axis=1) ** (1 / order)
    ratio = (ours + tiny) / (theirs + small)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))


def _bleu(references: Texts, captions: Texts) -> tuple[Any, Any]:
    from pycocoevalcap.bleu.bleu import Bleu

    return Bleu(4).compute_score(references, captions, verbose=0)


def _rouge(references: Texts, captions: Texts) -> tuple[Any, Any]:
    from pycocoevalcap.rouge.rouge import Rouge

    return Rouge().compute_score(references, captions)


def _cider(references: Texts, captions: Texts) -> tuple[Any, Any]:
    from pycocoevalcap.cider.cider import Cider

    if not any(caption for given in references.values() for caption in given):
        return 0.0, [0.0] * len(references)  # the reference fails if no reference has a word; nothing can match
    return Cider().compute_score(references, captions)


def _meteor(references: Texts, captions: Texts) -> tuple[Any, Any]:
    from pycocoevalcap.meteor.meteor import Meteor

    process = Meteor()
    try:
        return process.compute_score(references, captions)
    finally:
        if process.lock.locked():  # after a failure it keeps its lock, and would wait for it when it is deleted
            process.lock.release()


def _spice(references: Texts, captions: Texts) -> tuple[Any, Any]:
    from pycocoevalcap.spice.spice import Spice

    corpus, samples = Spice().compute_score(references, captions)
    return corpus, [parts["All"]["f"] for parts in samples]


def _why_not(name: str) -> str | None:
    """Why a metric that runs in Java cannot be measured; None = it can."""
    folder = reference_folder()
    if reason := why_no_jar():
        return reason
    assert folder is not None
    models = [folder / "spice" / "lib" / f"stanford-corenlp-3.6.0{part}.jar" for part in ("", "-models")]
    if name == "SPICE" and not all(path.is_file() for path in models):
        return "its language models are not there (python -m pycocoevalcap.spice.get_stanford_models downloads 1 GB)"
    return None


FAST = ("BLEU", "ROUGE-L", "CIDEr-D")
_SCORERS = {"BLEU": _bleu, "ROUGE-L": _rouge, "CIDEr-D": _cider, "METEOR": _meteor, "SPICE": _spice}
METRICS = tuple(_SCORERS)  # those not in FAST run in Java
