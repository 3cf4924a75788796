"""Retrieval as in the paper (4.4): the best candidates by ITC are re-ranked by ITM; for any number of images.

Shapes: N images, M texts, K candidates.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from openblip2.config import change
from openblip2.data.features import StoredFeatures, find_records
from openblip2.data.records import Record
from openblip2.data.text import BertTokens, clean_caption, only_unknown
from openblip2.evaluate.ranking import (
    Ranking,
    best_images,
    best_texts,
    image_vectors,
    log_odds,
    match_candidates,
    text_vectors,
)
from openblip2.evaluate.result import Options, Result
from openblip2.hardware import computing, device
from openblip2.inference.matcher import Matcher
from openblip2.progress import Progress
from openblip2.train.encode import make_cache, open_cache, whitened

KS = (1, 5, 10)
CANDIDATES = 128
TOKENS = 35  # maximum length of a text in the authors' evaluation; 32 in training
GROUP = 32  # images per batch


def score_retrieval(matcher: Matcher, records: Sequence[Record], options: Options, progress: Progress) -> Result:
    """Recall at 1, 5 and 10 in both directions, by ITC alone and, unless `options.rerank` is 0, re-ranked by ITM.

    The features of the images are in a cache on disk, so that memory use does not grow with their number.

    Raises:
        UserError: the cache does not fit the model, or the disk is full.
    """
    settings = change(matcher.settings, {"data.augment": False})
    vision = matcher.model.vision
    assert vision is not None
    with tempfile.TemporaryDirectory(prefix="openblip2-") as folder:
        if options.features is None:
            cache = make_cache(vision, records, settings, Path(folder), progress, "pictures")
        else:
            cache = open_cache(vision, settings, options.features)
        stored, problems = find_records(records, cache, whitened(vision))
        result = _score(matcher, stored, options, progress)
    result.skipped.extend(problems)
    own = "" if options.features is None else f", {options.features}"
    result.protocol["features"] = f"{cache.made_by['precision']}{own}"
    return result


def _score(matcher: Matcher, stored: StoredFeatures, options: Options, progress: Progress) -> Result:
    records, best = stored.records, CANDIDATES if options.rerank is None else options.rerank
    tokens = BertTokens(matcher.tokens.tokenizer, TOKENS, matcher.model.connector.sizes["positions"])
    owners = [n for n, record in enumerate(records) for _ in record.captions]
    captions = [clean_caption(caption) for record in records for caption in record.captions]
    unknown = only_unknown(tokens.tokenizer, captions)
    rankings = _rankings(matcher, stored, tokens, captions, best, progress)
    progress.doing("scoring")
    result = Result("retrieval", len(records), options.seed)
    for which, what in ((tokens.too_long(captions), f"are cut at {TOKENS} tokens"), (unknown, "become only [UNK]")):
        if which:
            first = records[owners[which[0]]].id
            result.warnings.append(f"{len(which):,} of {len(captions):,} captions {what}; the first belongs to {first}")
    result.protocol |= {
        "texts": len(captions),
        "longest_text": f"{TOKENS} tokens",
        "candidates": best,
        "itc": "best query's cosine",
        "itm": f"log-odds of a match, of the best {best} by ITC",
        "itm+itc": "log-odds of a match + cosine / temperature",
        "itm+itc, the authors'": "logit of a match + cosine",
        "right": "a picture's own captions" + ("" if options.strict else ", and every picture with the same one"),
    }
    # Texts with the same name are right for the same images.
    names: Sequence[int | str] = owners if options.strict else captions
    right: list[set[int | str]] = [set() for _ in records]
    for owner, name in zip(owners, names, strict=True):
        right[owner].add(name)
    of_images: list[dict[str, Any]] = [{"image": record.id} for record in records]
    of_texts: list[dict[str, Any]] = [
        {"caption": caption, "image": records[owner].id} for owner, caption in zip(owners, captions, strict=True)
    ]
    for row, texts in zip(of_images, rankings["itc"][0].indices[:, :5].tolist(), strict=True):
        row["captions_found"] = [captions[m] for m in texts]
    for name, (by_image, by_text) in rankings.items():
        tr = by_image.first_right(lambda n, m: names[m] in right[n])
        ir = by_text.first_right(lambda m, n: names[m] in right[n])
        for rows, ranks in ((of_images, tr), (of_texts, ir)):
            for row, rank in zip(rows, ranks, strict=True):
                row[f"{name} first right"] = rank
        for at in KS:
            if name == "itc" or at <= best:
                result.add(f"{name} tr@{at}", [rank is not None and rank <= at for rank in tr])
                result.add(f"{name} ir@{at}", [rank is not None and rank <= at for rank in ir], groups=owners)
    result.samples += [*of_images, *of_texts]
    return result


def _rankings(
    matcher: Matcher,
    stored: StoredFeatures,
    tokens: BertTokens,
    captions: Sequence[str],
    best: int,
    progress: Progress,
) -> dict[str, tuple[Ranking, Ranking]]:
    """For each score, by name: the rankings of texts for each image and of images for each text."""
    model, count = matcher.model, len(stored.records)
    with torch.inference_mode(), computing(model, matcher.settings.train.precision):
        progress.doing(f"reading {len(captions):,} texts")
        ids, valid = (t.to(device()) for t in tokens(captions))
        texts = text_vectors(model, ids, valid)
        parts = []
        with progress.steps("query outputs", count) as bar:
            for start in range(0, count, GROUP):
                rows = range(start, min(start + GROUP, count))
                parts.append(image_vectors(model, stored.take(rows).to(device())))
                bar.advance(count=len(rows))
        images, k = torch.cat(parts), max(best, *KS)
        by_image, by_text = best_texts(images, texts, k), best_images(images, texts, k)
        found = {"itc": (by_image, by_text)}
        if not best:
            return found
        by_image, by_text = (Ranking(one.indices[:, :best], one.scores[:, :best]) for one in (by_image, by_text))
        with progress.steps("re-ranking", count) as bar:
            matches = match_candidates(
                model, lambda n: stored.take([n]).to(device()), ids, valid, by_image, by_text, bar.advance
            )
        temperature = float(model.temperature)
        for name, score in {
            "itm": lambda logits, cosine: log_odds(logits),
            "itm+itc": lambda logits, cosine: log_odds(logits) + cosine / temperature,
            "itm+itc, the authors'": lambda logits, cosine: logits[..., 1] + cosine,
        }.items():
            pairs = zip((by_image, by_text), matches, strict=True)
            first, second = (ranking.by(score(logits, ranking.scores.float())) for ranking, logits in pairs)
            found[name] = first, second
    return found
