"""Captions against people's captions, as the published figures count them: BLEU, METEOR, ROUGE-L, CIDEr-D, SPICE.

The scorers are pycocoevalcap's, the reference that COCO and NoCaps figures are counted with. Scores are in [0, 1],
CIDEr-D's in [0, 10]; papers print all of them times 100.

Oddities of the reference, kept: "CIDEr" there is CIDEr-D; CIDEr-D weighs n-grams by how rare they are among the
references at hand, so that one picture alone scores 0 and a part of a data set scores otherwise than the whole; an
empty caption and an empty reference are a match to ROUGE-L and none to the others.
"""

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from subprocess import CalledProcessError
from typing import Any, Literal

import numpy as np

from openblip2.errors import UserError, one_line
from openblip2.evaluate.ptb import reference_folder, tokenise, why_no_jar
from openblip2.model.extras import require

FAST = ("BLEU", "ROUGE-L", "CIDEr-D")
METRICS = (*FAST, "METEOR", "SPICE")  # the last two run in Java
BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")  # the names under which BLEU's four scores are found
OWN_IDF = "CIDEr-D, own idf"
ENTIRE = "entire"


@dataclass(frozen=True)
class Cut:
    """Captions and references in tokens, one entry a picture. `by`: what cut them."""

    captions: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    by: str

    def take(self, places: Sequence[int]) -> "Cut":
        chosen = [(self.captions[place], self.references[place]) for place in places]
        return Cut(tuple(caption for caption, _ in chosen), tuple(given for _, given in chosen), self.by)


@dataclass(frozen=True)
class CaptionScores:
    """Scores of `n` captions.

    Attributes:
        corpus: of all together; BLEU and METEOR are not the mean of their samples.
        samples: of each picture, [n] in the given order.
        missing: what was not measured, and why.
        tokens: what cut the captions.
    """

    n: int
    corpus: dict[str, float]
    samples: dict[str, np.ndarray]
    missing: dict[str, str]
    tokens: str

    def as_log(self) -> dict[str, Any]:
        return {"n": self.n, **self.corpus, "not measured": self.missing, "tokens": self.tokens}


def cut(captions: Sequence[str], references: Sequence[Sequence[str]], by: Literal["jar", "port"] | None = None) -> Cut:
    """Cut captions and each picture's references into tokens, for `caption_scores`. `by`: as in `tokenise`.

    Raises:
        UserError: nothing to score, as many captions as reference lists are not there, or a picture has no reference.
    """
    if not captions or len(captions) != len(references):
        raise UserError(f"{len(captions)} captions and {len(references)} lists of references; one of each a picture")
    without = next((place for place, given in enumerate(references) if not given), None)
    if without is not None:
        raise UserError(f"picture {without} has no reference caption; one at least")
    ours = tokenise(captions, by)
    theirs = iter(tokenise([caption for given in references for caption in given], by).captions)
    return Cut(ours.captions, tuple(tuple(next(theirs) for _ in given) for given in references), ours.by)


def caption_scores(tokens: Cut, wanted: Sequence[str] = METRICS) -> CaptionScores:
    """Score captions that `cut` has cut. `wanted`: of `METRICS`; METEOR takes 10 s to start, SPICE minutes.

    METEOR and SPICE are not measured, and `missing` says why, where there is no Java, where SPICE's language models
    (1 GB) have not been downloaded, or where Java fails.

    Raises:
        UserError: a metric that there is not, or pycocoevalcap is not installed.
    """
    return _scores(tokens, _scorers(wanted))


def domain_scores(tokens: Cut, domains: Sequence[str], wanted: Sequence[str] = METRICS) -> dict[str, CaptionScores]:
    """NoCaps: scores of each domain ("in-domain", "near-domain", "out-domain") and of all, under "entire".

    A domain's CIDEr-D is the mean over its pictures with the idf of the entire set. The server's code is not public;
    what says so is the published rows: in all nine that were tried (BLIP-2's, BLIP's, VinVL's, SimVLM's, UpDown's) the
    mean of the domains, weighted by their 648, 2,938 and 914 pictures, meets the overall score to rounding, by 0.01
    points on the average, and idf of a domain's own would miss it by tenths or more. That other reading, which is
    that of scripts that score each domain as a data set, stands under `OWN_IDF`, for comparison with them.

    Args:
        domains: of each picture.
        tokens, wanted: as in `caption_scores`.
    """
    assert len(domains) == len(tokens.captions), "a domain for each picture"
    scorers = _scorers(wanted)
    entire = _scores(tokens, scorers)
    found = {}
    for domain in dict.fromkeys(domains):
        places = [place for place, its in enumerate(domains) if its == domain]
        part = _scores(tokens.take(places), scorers)
        if "CIDEr-D" in part.corpus:
            shared = entire.samples["CIDEr-D"][places]
            corpus = part.corpus | {"CIDEr-D": float(shared.mean()), OWN_IDF: part.corpus["CIDEr-D"]}
            part = replace(part, corpus=corpus, samples=part.samples | {"CIDEr-D": shared})
        found[domain] = part
    return found | {ENTIRE: entire}


def bleu_counts(tokens: Cut) -> np.ndarray:
    """What each picture adds to corpus BLEU, [n, 10]: matches and n-grams of 1 to 4 tokens, tokens, reference tokens.

    With `bleu` the score of `intervals.interval`.
    """
    require("BLEU", "eval", "pycocoevalcap")
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for caption, given in zip(tokens.captions, tokens.references, strict=True):
        scorer += (caption, list(given))
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


Scorer = Callable[[dict[int, list[str]], dict[int, list[str]]], tuple[Any, Any]]


def _scorers(wanted: Sequence[str]) -> dict[str, Scorer | str]:
    """By name what scores, or why it is not measured."""
    unknown = [name for name in wanted if name not in METRICS]
    if unknown:
        raise UserError(f"there is no metric {unknown[0]!r}; one of {', '.join(METRICS)}")
    require("scoring captions", "eval", "pycocoevalcap")
    found: dict[str, Scorer | str] = {}
    if "BLEU" in wanted:
        from pycocoevalcap.bleu.bleu import Bleu

        found["BLEU"] = lambda given, ours: Bleu(4).compute_score(given, ours, verbose=0)
    if "ROUGE-L" in wanted:
        from pycocoevalcap.rouge.rouge import Rouge

        found["ROUGE-L"] = Rouge().compute_score
    if "CIDEr-D" in wanted:
        from pycocoevalcap.cider.cider import Cider

        found["CIDEr-D"] = lambda given, ours: _cider(Cider().compute_score, given, ours)
    if "METEOR" in wanted:
        found["METEOR"] = why_no_jar() or _meteor()
    if "SPICE" in wanted:
        found["SPICE"] = why_no_jar() or _why_no_spice() or _spice()
    return found


def _scores(tokens: Cut, scorers: dict[str, Scorer | str]) -> CaptionScores:
    ours = {place: [caption] for place, caption in enumerate(tokens.captions)}
    theirs = {place: list(given) for place, given in enumerate(tokens.references)}
    corpus: dict[str, float] = {}
    samples: dict[str, np.ndarray] = {}
    missing: dict[str, str] = {}
    for name, scorer in scorers.items():
        if isinstance(scorer, str):
            missing[name] = scorer
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                whole, each = scorer(theirs, ours)
        except _JavaFailed as error:
            missing[name] = str(error)
            continue
        several = zip(BLEU, whole, each, strict=True) if name == "BLEU" else [(name, whole, each)]
        for one, of_all, of_each in several:
            corpus[one], samples[one] = float(of_all), np.asarray(of_each, dtype=np.float64)
    return CaptionScores(len(ours), corpus, samples, missing, tokens.by)


class _JavaFailed(Exception):
    """One metric could not be measured, which is no reason to lose the others."""


def _in_java(name: str, scorer: Scorer) -> Scorer:
    """`scorer` with every way its Java can fail named as one."""

    def guarded(given: dict[int, list[str]], ours: dict[int, list[str]]) -> tuple[Any, Any]:
        try:
            return scorer(given, ours)
        except (CalledProcessError, OSError, ValueError) as error:  # no number comes back from a process that ended
            raise _JavaFailed(f"{name} failed in Java: {one_line(error)}") from error

    return guarded


def _cider(scorer: Scorer, given: dict[int, list[str]], ours: dict[int, list[str]]) -> tuple[Any, Any]:
    """CIDEr-D, which the reference cannot count where no reference has a word: nothing can match there."""
    if not any(caption for captions in given.values() for caption in captions):
        return 0.0, [0.0] * len(given)
    return scorer(given, ours)


def _meteor() -> Scorer:
    """METEOR 1.5 in one Java process, started on first use."""
    from pycocoevalcap.meteor.meteor import Meteor

    started: list[Any] = []

    def score(given: dict[int, list[str]], ours: dict[int, list[str]]) -> tuple[Any, Any]:
        if not started:
            started.append(Meteor())
        try:
            return started[0].compute_score(given, ours)
        finally:
            if started[0].lock.locked():  # where it fails it keeps its lock, and waits for it when it is thrown away
                started[0].lock.release()

    return _in_java("METEOR", score)


def _why_no_spice() -> str | None:
    folder = reference_folder()
    assert folder is not None
    wanted = [folder / "spice" / "lib" / f"stanford-corenlp-3.6.0{part}.jar" for part in ("", "-models")]
    if all(path.is_file() for path in wanted):
        return None
    return "its language models are not there (python -m pycocoevalcap.spice.get_stanford_models downloads 1 GB)"


def _spice() -> Scorer:
    from pycocoevalcap.spice.spice import Spice

    def score(given: dict[int, list[str]], ours: dict[int, list[str]]) -> tuple[Any, Any]:
        whole, each = Spice().compute_score(given, ours)
        return whole, [parts["All"]["f"] for parts in each]

    return _in_java("SPICE", score)
