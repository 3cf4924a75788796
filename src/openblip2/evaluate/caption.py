"""Scores captions as in the paper (4.2): BLEU, METEOR, ROUGE-L, CIDEr-D and SPICE against human captions.

The scorers are those of pycocoevalcap, which published results on COCO and NoCaps use. Scores are in [0, 1], those of
CIDEr-D in [0, 10]; papers print all of them times 100.

The peculiarities of pycocoevalcap are kept. Its "CIDEr" is CIDEr-D. CIDEr-D weights n-grams by how rare they are among
the references of the scored images, so a single image scores 0, and a part of a data set scores differently from the
whole. For ROUGE-L, an empty caption and an empty reference match; for the other metrics, they do not.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import numpy as np

from openblip2.data.records import Record
from openblip2.errors import one_line, require
from openblip2.evaluate.ptb import tokenise, why_no_jar
from openblip2.evaluate.result import WITHHELD, Options, PartialTexts, Result, decoding_card, interval
from openblip2.inference.captioner import CAPTION, Captioner
from openblip2.progress import Progress

GROUP = 64  # images that are captioned and saved together
FAST = ("BLEU", "ROUGE-L", "CIDEr-D")
METRICS = (*FAST, "METEOR", "SPICE")  # those not in FAST run in Java
BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")  # the names of BLEU's four scores
# For these metrics, the corpus score is the mean over images, so the interval of a mean applies.
MEANS = ("ROUGE-L", "CIDEr-D", "SPICE")


def score_captions(
    captioner: Captioner,
    records: Sequence[Record],
    options: Options,
    progress: Progress,
    partial_texts: PartialTexts,
) -> Result:
    """Scores the captions of all images; for NoCaps, also those of each domain.

    Args:
        records: images, with captions unless the ground truth of the split is withheld.
        partial_texts: stores the captions until they are scored.

    Raises:
        UserError: pycocoevalcap is missing, or an image cannot be opened.
    """
    require("scoring captions", "eval", "pycocoevalcap")  # before minutes are spent on generating captions
    decoding = replace(CAPTION, beams=options.beams or CAPTION.beams)
    prompt = captioner.settings.language.prompts[0] if options.prompt is None else options.prompt

    def generate(rows: slice) -> list[str]:
        images = [record.image for record in records[rows]]
        return captioner.generate(images, [prompt] * len(images), decoding)

    names, how = [str(record.image) for record in records], [prompt, decoding_card(decoding)]
    captions = partial_texts.texts("captions", "pictures", names, GROUP, generate, progress, how)
    progress.doing("scoring")
    result = Result("caption", len(records), options.seed)
    result.protocol |= decoding_card(decoding) | {"prompt": prompt}
    result.samples += [
        {"image": record.id, "caption": caption} for record, caption in zip(records, captions, strict=True)
    ]
    if not all(record.captions for record in records):
        result.warnings.append(WITHHELD)
        return result
    tokens = tokenise_all(captions, [record.captions for record in records])
    result.protocol |= {
        "captions_each": sorted({len(record.captions) for record in records}),
        "tokeniser": tokens.by,
        "cider": "CIDEr-D, idf of the captions scored",
    }
    scores = caption_scores(tokens, METRICS if options.slow else FAST)
    add_domains(result, records, scores.samples)
    counts = bleu_counts(tokens)
    for order, name in enumerate(BLEU, 1):
        result.scores[name] = interval(counts, partial(bleu, order=order), seed=result.seed)
    for name in MEANS:
        if name in scores.samples:
            result.add(name, scores.samples[name])
    if "METEOR" in scores.corpus:
        result.alone["METEOR"] = scores.corpus["METEOR"]
    if not options.slow:
        scores.missing.update(dict.fromkeys(("METEOR", "SPICE"), "not asked for: --slow"))
    result.protocol["not_measured"] = scores.missing
    for n, (row, record) in enumerate(zip(result.samples, records, strict=True)):
        row["references"] = list(record.captions)
        row |= {name: float(each[n]) for name, each in scores.samples.items()}
    return result


def add_domains(result: Result, records: Sequence[Record], samples: Mapping[str, np.ndarray]) -> None:
    """Adds CIDEr-D and SPICE of each domain if the records have domains, as in NoCaps.

    The CIDEr-D of a domain uses the idf of the entire set. The code of NoCaps' server is not public, but published
    results show this: in all nine rows that were tried (of BLIP-2, BLIP, VinVL, SimVLM and UpDown), the mean of the
    domains, weighted by their 648, 2,938 and 914 images, equals the overall score up to rounding (the difference is
    0.01 points on average). With the idf of each domain alone, the difference would be tenths of a point or more.
    """
    domains = [(record.facts or {}).get("domain") for record in records]
    if not all(isinstance(domain, str) for domain in domains):
        return
    for domain in dict.fromkeys(domains):
        rows = [n for n, one in enumerate(domains) if one == domain]
        for name in ("CIDEr-D", "SPICE"):
            if name in samples:
                result.add(f"{name}, {domain}", samples[name][rows])


@dataclass(frozen=True)
class Tokenised:
    """Captions and references as tokens, one entry per image, and the name of the tokeniser."""

    captions: list[str]
    references: list[list[str]]
    by: str


@dataclass(frozen=True)
class CaptionScores:
    """Scores of n captions.

    Attributes:
        corpus: scores of all captions together; for BLEU and METEOR, they are not the mean of `samples`.
        samples: scores of each image, [n].
        missing: metrics that were not measured, and the reasons.
    """

    corpus: dict[str, float]
    samples: dict[str, np.ndarray]
    missing: dict[str, str]


def tokenise_all(captions: Sequence[str], references: Sequence[Sequence[str]], jar: bool = True) -> Tokenised:
    """Tokenises one caption and at least one reference per image, for `caption_scores`; `jar` as in `tokenise`."""
    assert captions, "at least one image"
    ours, by = tokenise(captions, jar)
    theirs = iter(tokenise([caption for of_image in references for caption in of_image], jar)[0])
    return Tokenised(ours, [[next(theirs) for _ in of_image] for of_image in references], by)


def caption_scores(tokens: Tokenised, wanted: Sequence[str]) -> CaptionScores:
    """Scores captions that were tokenised by `tokenise_all`.

    METEOR and SPICE are not measured, and `missing` says why, if there is no Java, if SPICE's language models (1 GB)
    have not been downloaded, or if Java fails.

    Args:
        tokens: captions and references.
        wanted: names of `METRICS`. METEOR takes 10 s to start; SPICE takes minutes.
    """
    references = dict(enumerate(tokens.references))
    captions = {n: [caption] for n, caption in enumerate(tokens.captions)}
    found = CaptionScores({}, {}, {})
    for name in wanted:
        if name not in FAST and (reason := _why_not(name)):
            found.missing[name] = reason
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                corpus, samples = _score(name, references, captions)
        except (CalledProcessError, OSError, ValueError) as error:  # Java returns no number if it has failed
            if name in FAST:
                raise
            found.missing[name] = f"{name} failed in Java: {one_line(error)}"
            continue
        several = zip(BLEU, corpus, samples, strict=True) if name == "BLEU" else [(name, corpus, samples)]
        for one, of_all, of_each in several:
            found.corpus[one], found.samples[one] = float(of_all), np.asarray(of_each, dtype=np.float64)
    return found


def bleu_counts(tokens: Tokenised) -> np.ndarray:
    """Counts of each image for corpus BLEU, [n, 10]: matches and n-grams of 1 to 4 tokens, tokens, reference tokens.

    They are the `counts` of `result.interval` if its `score` is `bleu`.
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for caption, given in zip(tokens.captions, tokens.references, strict=True):
        scorer += (caption, given)
    rows = []
    for one in scorer.ctest:
        closest = min((abs(length - one["testlen"]), length) for length in one["reflen"])[1]
        rows.append([*one["correct"], *one["guess"], one["testlen"], closest])
    return np.array(rows, dtype=np.float64)


def bleu(sums: np.ndarray, order: int = 4) -> np.ndarray:
    """BLEU-`order` from sums of `bleu_counts`: `[draws, 10]` -> [draws] in [0, 1]."""
    correct, said, (ours, theirs) = sums[:, :order], sums[:, 4 : 4 + order], sums[:, 8:].T
    tiny, small = 1e-15, 1e-9  # the reference's guards against zero
    precision = np.prod((correct + tiny) / (said + small), axis=1) ** (1 / order)
    ratio = (ours + tiny) / (theirs + small)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))


def _score(name: str, references: dict[int, list[str]], captions: dict[int, list[str]]) -> tuple[Any, Any]:
    """Runs a scorer of pycocoevalcap: the score of all captions and the scores of each; BLEU returns four of both."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.spice.spice import Spice

    if name == "BLEU":
        return Bleu(4).compute_score(references, captions, verbose=0)
    if name == "SPICE":
        corpus, samples = Spice().compute_score(references, captions)
        return corpus, [parts["All"]["f"] for parts in samples]
    if name == "CIDEr-D" and not any(caption for given in references.values() for caption in given):
        return 0.0, [0.0] * len(references)  # the scorer fails if no reference has a word; nothing can match
    scorer = {"ROUGE-L": Rouge, "CIDEr-D": Cider, "METEOR": Meteor}[name]()
    try:
        return scorer.compute_score(references, captions)
    finally:
        if name == "METEOR" and scorer.lock.locked():  # after a failure, its `__del__` would wait for this lock
            scorer.lock.release()


def _why_not(name: str) -> str | None:
    """Why a metric that runs in Java cannot be measured; None = it can."""
    from pycocoevalcap.spice.get_stanford_models import JAR, SPICEDIR, SPICELIB

    if (reason := why_no_jar()) or name != "SPICE":
        return reason
    if not all(Path(SPICEDIR, SPICELIB, f"{JAR}{part}.jar").is_file() for part in ("", "-models")):
        return "its language models are not there (python -m pycocoevalcap.spice.get_stanford_models downloads 1 GB)"
    return None
