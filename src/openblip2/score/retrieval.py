"""Retrieval scored as in the paper (4.4): ITC's best candidates, then re-ranked by ITM; over any number of pictures.

Shapes: N images, M texts, K candidates, Q queries, E shared space.
"""

import tempfile
from collections.abc import Hashable, Sequence
from pathlib import Path

import torch

from openblip2.config import change
from openblip2.data.features import StoredFeatures, find_records
from openblip2.data.records import Record
from openblip2.data.text import clean_caption
from openblip2.data.tokens import QFormerTokens
from openblip2.evaluate.ranking import Matches, Ranking, best_images, best_texts, hits_at, log_odds
from openblip2.evaluate.retrieval import image_vectors, text_vectors
from openblip2.hardware import computing, device
from openblip2.matcher import Matcher
from openblip2.progress import Progress
from openblip2.score.result import Result
from openblip2.train.encode import make_cache, open_cache, whitened

KS = (1, 5, 10)
TOKENS = 35  # the authors' longest text in evaluation; 32 in training
GROUP = 32  # pictures at once


def score_retrieval(
    matcher: Matcher,
    records: Sequence[Record],
    best: int,
    progress: Progress,
    features: Path | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Result:
    """Recall at 1, 5 and 10 both ways, by ITC alone and, unless `best` is 0, by ITM over the `best` candidates.

    The pictures' features lie in a cache on the disk while this runs, which is why memory does not grow with them.

    Args:
        features: a cache that `openblip2 features` made of these pictures; None = a temporary one.
        strict: only a picture's own captions count as right. Else every picture with the same caption does, too.

    Raises:
        UserError: a cache that does not fit, or a full disk.
    """
    settings = change(matcher.settings, {"data.augment": False})
    vision = matcher.model.vision
    assert vision is not None
    with tempfile.TemporaryDirectory(prefix="openblip2-") as folder:
        if features is None:
            cache = make_cache(vision, records, settings, Path(folder), progress, "pictures")
        else:
            cache = open_cache(vision, settings, features)
        stored, problems = find_records(records, cache, whitened(vision))
        found = _score(matcher, stored, best, progress, strict, device(), seed)
    found.skipped.extend(problems)
    if features is None:
        found.protocol["features"] = "fp16"
    else:
        found.protocol["features"] = f"{cache.made_by['precision']}, {features}"
    return found


def _score(
    matcher: Matcher,
    stored: StoredFeatures,
    best: int,
    progress: Progress,
    strict: bool,
    place: torch.device,
    seed: int,
) -> Result:
    model, records = matcher.model, stored.records
    tokens = QFormerTokens(matcher.tokens.tokenizer, TOKENS)
    written = [(n, clean_caption(caption)) for n, record in enumerate(records) for caption in record.captions]
    captions = [caption for _, caption in written]
    k = min(max(best, max(KS)), len(captions))
    with torch.inference_mode(), computing(model, matcher.settings.train.precision):
        progress.doing(f"reading {len(captions):,} texts")
        ids, valid = (t.to(place) for t in tokens(captions))
        texts = text_vectors(model, ids, valid)
        images = []
        with progress.steps("query outputs", len(records)) as bar:
            for start in range(0, len(records), GROUP):
                rows = range(start, min(start + GROUP, len(records)))
                images.append(image_vectors(model, stored.take(rows).to(place)))
                bar.advance(count=len(rows))
        directions = torch.cat(images)
        by_image, by_text = best_texts(directions, texts, k), best_images(directions, texts, min(k, len(records)))
        rankings = {"itc": (by_image, by_text)}
        if best:
            few = (_first(by_image, best), _first(by_text, best))
            matches = Matches(*few)
            with progress.steps("re-ranking", len(records)) as bar:
                matches.score(model, lambda n: stored.take([n]).to(place), ids, valid, bar.advance)
            pairs = (matches.of_images(few[0]), matches.of_texts(few[1]))
            warmth = float(model.temperature)
            for name, score in (
                ("itm", lambda logits, cosine: log_odds(logits)),
                ("itm+itc", lambda logits, cosine: log_odds(logits) + cosine / warmth),
                ("itm+itc, the authors'", lambda logits, cosine: logits[..., 1] + cosine),
            ):
                rankings[name] = tuple(r.by(score(p, r.scores.float())) for r, p in zip(few, pairs, strict=True))  # pyright: ignore
    progress.doing("scoring")
    right = _accepted(records, written, strict)
    result = Result("retrieval", len(records), seed)
    result.protocol |= {
        "texts": len(captions),
        "longest_text": f"{TOKENS} tokens",
        "candidates": best,
        "itc": "best query's cosine",
        "itm": f"log-odds of a match, of the best {best} by ITC",
        "itm+itc": "log-odds of a match + cosine / temperature",
        "itm+itc, the authors'": "logit of a match + cosine",
        "right": "a picture's own captions"
        if strict
        else "a picture's own captions, and every picture with the same one",
    }
    for name, (of_images, of_texts) in rankings.items():
        for at in KS:
            if name != "itc" and at > best:
                continue
            result.add(f"{name} tr@{at}", hits_at(of_images, right[0], right[2], at))
            owners = [n for n, _ in written]
            result.add(f"{name} ir@{at}", hits_at(of_texts, right[1], right[3], at), groups=owners)
    result.samples += [
        {"image": record.id, "captions_found": [captions[m] for m in rankings["itc"][0].places[n, :5].tolist()]}
        | {f"{name} first right": _rank(ranking[0], n, right[0][n], right[2]) for name, ranking in rankings.items()}
        for n, record in enumerate(records)
    ]
    result.samples += [
        {"caption": caption, "image": records[owner].id}
        | {f"{name} first right": _rank(ranking[1], m, right[1][m], right[3]) for name, ranking in rankings.items()}
        for m, (owner, caption) in enumerate(written)
    ]
    return result


def _first(ranking: Ranking, k: int) -> Ranking:
    return Ranking(ranking.places[:, :k], ranking.scores[:, :k])


def _accepted(
    records: Sequence[Record], written: Sequence[tuple[int, str]], strict: bool
) -> tuple[list[set[Hashable]], list[set[Hashable]], list[Hashable], list[Hashable]]:
    """What counts as right for each image and for each text, and the names of texts and of images that say it."""
    if strict:
        of_images: list[set[Hashable]] = [{n} for n in range(len(records))]
        return of_images, [{n} for n, _ in written], [n for n, _ in written], list(range(len(records)))
    own: list[set[Hashable]] = [set() for _ in records]
    holders: dict[str, set[Hashable]] = {}
    for n, caption in written:
        own[n].add(caption)
        holders.setdefault(caption, set()).add(n)
    return own, [holders[caption] for _, caption in written], [c for _, c in written], list(range(len(records)))


def _rank(ranking: Ranking, row: int, accepted: set[Hashable], names: Sequence[Hashable]) -> int | None:
    """The place of the first right candidate, from 1; None if there is none among the candidates."""
    for place, candidate in enumerate(ranking.places[row].tolist(), 1):
        if names[candidate] in accepted:
            return place
    return None
