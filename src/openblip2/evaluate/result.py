"""Results of an evaluation: scores with intervals, the protocol, one line per sample; and the comparison of two.

Intervals show the uncertainty that comes from the choice of the test images (percentile bootstrap; Efron, 1979). Images
are drawn with replacement, as many as there are, and the interval contains the middle 95 % of the draws' scores. The
questions or captions of one image are drawn together, because they are not independent. The paper gives no intervals.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openblip2.errors import UserError
from openblip2.model.decoding import Decoding
from openblip2.progress import Progress
from openblip2.runs import read_json, write_json, write_text

WITHHELD = "this split has no public reference answers: nothing is scored, the predictions are in the samples"
LEVEL = 0.95
DRAWS = 2000
_AT_ONCE = 4_000_000  # indices held in memory at a time: 32 MiB


@dataclass(frozen=True)
class Options:
    """Options of an evaluation. An option that the task does not use is an error.

    Attributes:
        prompt: for captions, the text after the soft prompt; None = the prompt of the run.
        beams: number of beams for captions and answers; None = 5, as in the paper.
        metric: metric for answers; None = the usual one for the data.
        lemmatised: compare nouns and verbs of answers in their dictionary form, as OK-VQA does.
        slow: also measure METEOR and SPICE, which need Java.
        rerank: number of candidates that ITM scores; None = 128, as in the paper; 0 = rank by ITC alone.
        strict: only an image's own captions are right. Otherwise, every image with the same caption is also right.
        by: for pointing, the score to use: itc or itm.
        features: a feature cache of these images, written by `openblip2 features`; None = a temporary one.
        limit: use only this many images, from the beginning; None = all.
        seed: seed of the bootstrap.
        visual_tokens: for captions and answers, number of visual tokens that the language model reads; None = all.
    """

    prompt: str | None = None
    beams: int | None = None
    metric: str | None = None
    lemmatised: bool = False
    slow: bool = False
    rerank: int | None = None
    strict: bool = False
    by: str | None = None
    features: Path | None = None
    limit: int | None = None
    seed: int = 0
    visual_tokens: int | None = None


@dataclass(frozen=True)
class Interval:
    """A score of n samples and the interval that contains 95 % of the draws, all in the unit of the score."""

    score: float
    low: float
    high: float
    n: int

    def excludes(self, value: float) -> bool:
        """Whether `value` is outside the interval. A difference between two systems is significant if 0 is outside."""
        return not self.low <= value <= self.high


def mean_interval(scores: np.ndarray, groups: Sequence[Hashable] | None = None, seed: int = 0) -> Interval:
    """Interval of the mean of per-sample scores, [n]; other arguments as in `interval`.

    The idf of CIDEr-D is not computed again for each draw. BLEU is not a mean: use `interval` with `bleu_counts`.
    """
    counts = np.stack([scores, np.ones(len(scores))], axis=1)
    return interval(counts, lambda sums: sums[:, 0] / sums[:, 1], groups, seed)


def difference_interval(first: np.ndarray, second: np.ndarray, groups: Sequence[Hashable] | None = None) -> Interval:
    """Interval of mean(first) - mean(second): scores of two systems for the same samples in the same order, [n] each.

    Each draw takes the same images for both systems, so images that are hard for both do not widen the interval.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    assert first.shape == second.shape, "two systems' scores of the same samples"
    return mean_interval(first - second, groups)


def interval(
    counts: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray],
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Interval:
    """Interval of a score that is a function of sums over the samples, such as BLEU, which depends on n-gram counts.

    Args:
        counts: [n, k], what each sample adds to the sums.
        score: sums [draws, k] -> scores [draws].
        groups: the image of each sample; None = each sample is drawn on its own.
        seed: seed of the draws.
    """
    assert len(counts) > 0, "at least one sample"
    sums = np.asarray(counts, dtype=np.float64)
    if groups is not None:  # the sums of each group, in the order in which groups first appear: [G, k]
        assert len(groups) == len(counts), "a group for each sample"
        index = {group: n for n, group in enumerate(dict.fromkeys(groups))}
        by_group = np.zeros((len(index), sums.shape[1]))
        np.add.at(by_group, [index[group] for group in groups], sums)
        sums = by_group
    random, found = np.random.default_rng(seed), []
    most = max(1, _AT_ONCE // len(sums))
    for start in range(0, DRAWS, most):
        drawn = random.integers(0, len(sums), size=(min(most, DRAWS - start), len(sums)))
        found.append(score(np.stack([column[drawn].sum(axis=1) for column in sums.T], axis=1)))
    low, high = np.quantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(score(sums.sum(axis=0, keepdims=True))[0]), float(low), float(high), len(counts))


@dataclass
class Result:
    """Scores of one task, filled piece by piece.

    Attributes:
        task: caption, vqa, retrieval or pointing.
        pictures: number of images that were scored.
        seed: seed of the bootstrap.
        scores: scores with intervals, by name.
        alone: scores without an interval, by name.
        beside: other values to compare the scores with, such as the scores of guessers.
        protocol: everything that the scores depend on.
        skipped: one line for each entry or image left out.
        warnings: one line for each warning.
        samples: one row for each sample.
    """

    task: str
    pictures: int
    seed: int = 0
    scores: dict[str, Interval] = field(default_factory=dict)
    alone: dict[str, float] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, scores: Sequence[float] | np.ndarray, groups: Sequence[Hashable] | None = None) -> None:
        """Adds the mean of per-sample scores with its interval; `groups` are the images of the samples."""
        self.scores[name] = mean_interval(np.asarray(scores), groups, seed=self.seed)

    def as_json(self) -> dict[str, Any]:
        """Everything except the samples."""
        return {
            "task": self.task,
            "pictures": self.pictures,
            "scores": {name: asdict(score) for name, score in self.scores.items()}
            | {name: {"score": score} for name, score in self.alone.items()},
            "beside": self.beside,
            "intervals": f"{LEVEL:.0%}, percentile bootstrap over pictures" if self.scores else None,
            "protocol": self.protocol,
            "warnings": self.warnings,
            "skipped": {"count": len(self.skipped), "first": self.skipped[:20]},
        }

    def in_words(self) -> list[str]:
        """A line for each score, then the warnings."""
        width = max(map(len, [*self.scores, *self.alone]), default=0)
        lines = [
            f"{name:{width}} {100 * s.score:7.2f}  [{100 * s.low:.2f}, {100 * s.high:.2f}]"
            for name, s in self.scores.items()
        ]
        lines += [f"{name:{width}} {100 * score:7.2f}" for name, score in self.alone.items()]
        return [*lines, *(f"warning: {warning}" for warning in self.warnings)]

    def write(self, out: Path) -> None:
        """Writes `out` and, beside it, `NAME.samples.jsonl`, each completely or not at all."""
        beside = out.with_suffix(".samples.jsonl")
        write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.samples), beside)
        write_json(self.as_json() | {"samples": beside.name}, out)


def decoding_card(decoding: Decoding) -> dict[str, Any]:
    """How text was generated, for the protocol; lengths are in new tokens."""
    return {
        "beams": decoding.beams,
        "length_penalty": decoding.length_penalty if decoding.beams > 1 else None,
        "repetition_penalty": decoding.repetition_penalty,
        "most_new_tokens": decoding.max_new_tokens,
        "least_new_tokens": decoding.min_new_tokens,
        "generation_config": "the language model's own is not used",
    }


def compare(first: Path, second: Path) -> dict[str, Interval]:
    """The mean of each score in the first result minus that in the second, paired by sample, with its interval.

    Raises:
        UserError: a file is not a result, or the two differ in task or samples, or have no score in common.
    """
    a, b = _read(first), _read(second)
    if a["task"] != b["task"]:
        raise UserError(f"{first} is of {a['task']}, {second} of {b['task']}: compare results of the same task")
    ours, theirs = ({_name(row): row for row in result["rows"]} for result in (a, b))
    if ours.keys() != theirs.keys():
        odd = " / ".join(map(str, next(iter(ours.keys() ^ theirs.keys()))))
        raise UserError(f"{first} and {second} have different samples, e.g. {odd}: evaluate the same data")
    values: dict[str, list[tuple[float, str]]] = {}  # for each score: difference and image of each sample
    for key, row in ours.items():
        mine, other = _scores(row), _scores(theirs[key])
        for name in mine.keys() & other.keys():
            values.setdefault(name, []).append((mine[name] - other[name], row["image"]))
    if not values:
        raise UserError(f"{first} and {second} have no score per sample in common: nothing can be compared")
    return {
        name: mean_interval(np.array([difference for difference, _ in pairs]), [image for _, image in pairs])
        for name, pairs in sorted(values.items())
    }


def _scores(row: dict[str, Any]) -> dict[str, float]:
    """The scores of a sample that `compare` averages, by name."""
    if "kind" in row:
        return {"accuracy": row["score"], f"accuracy, {row['kind']}": row["score"]}
    if "hit" in row:
        return {"pointing": float(row["hit"])}
    if "references" in row:
        return {name: row[name] for name in ("CIDEr-D", "ROUGE-L", "SPICE") if name in row}
    end, way = " first right", "ir" if "caption" in row else "tr"
    return {f"{name.removesuffix(end)} {way}@1": float(row[name] == 1) for name in row if name.endswith(end)}


def _name(row: dict[str, Any]) -> tuple[Any, ...]:
    """The key of a sample. In a row with references, the caption was generated, so it is not part of the key."""
    caption = row.get("caption") if "references" not in row else None
    return (row["image"], row.get("question_id"), row.get("question"), caption, row.get("text"))


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict) or not {"task", "samples"} <= found.keys():
        raise UserError(f"{path} is not a result of `openblip2 evaluate`")
    try:
        lines = (path.parent / Path(found["samples"]).name).read_text(encoding="utf-8").splitlines()
        return found | {"rows": [json.loads(line) for line in lines]}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: its samples, {found['samples']}, are missing or damaged: evaluate again") from error


class PartialTexts:
    """The file `OUT.partial.jsonl`: a digest of what the texts depend on, then a line for each group of texts.

    Args:
        path: path of the file; None = texts are not stored.
        of: everything that the texts depend on, except the arguments of `texts`.
    """

    def __init__(self, path: Path | None = None, of: Any = None) -> None:
        self.path, self.of = path, of

    def texts(
        self,
        what: str,
        unit: str,
        samples: Sequence[Any],
        group: int,
        generate: Callable[[slice], list[str]],
        progress: Progress,
        how: Any,
    ) -> list[str]:
        """Returns one text for each sample, from the file if it is there; generates and stores the others.

        Args:
            samples: ids and questions; texts in the file are used only if these and `how` are the same.
            group: number of samples that are generated and written together.
            generate: returns the texts for a slice of the samples.
            how: prompt and decoding settings.
        """
        depends_on = json.dumps([self.of, how, samples], default=str)
        digest, path = json.dumps(hashlib.sha256(depends_on.encode()).hexdigest()), self.path
        found: list[str] = []
        if path is not None:
            lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
            complete = lines[:-1] if lines[0] == digest else [digest]  # the last line may be unfinished
            write_text("".join(f"{line}\n" for line in complete), path)
            found = [text for line in complete[1:] for text in json.loads(line)]
        with progress.steps(what, len(samples), len(found), unit) as bar:
            for start in range(len(found), len(samples), group):
                texts = generate(slice(start, start + group))
                found += texts
                if path is not None:
                    with path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(texts, ensure_ascii=False) + "\n")
                bar.advance(count=len(texts))
        return found
