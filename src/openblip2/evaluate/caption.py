"""Captions scored as in the paper (4.2): BLEU, METEOR, ROUGE-L, CIDEr and SPICE against captions by people."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from openblip2.data.records import Record
from openblip2.errors import require
from openblip2.evaluate.caption_metrics import BLEU, FAST, METRICS, bleu, bleu_counts, caption_scores, tokenise_all
from openblip2.evaluate.partial_texts import PartialTexts
from openblip2.evaluate.protocol import WITHHELD, decoding_card
from openblip2.evaluate.result import Result
from openblip2.inference.captioner import Captioner
from openblip2.model.decoding import Decoding
from openblip2.progress import Progress

GROUP = 64  # images that are captioned and kept together
# The corpus score of these is the mean over images, so their interval is that of a mean.
MEANS = ("ROUGE-L", "CIDEr-D", "SPICE")


def score_captions(
    captioner: Captioner,
    records: Sequence[Record],
    decoding: Decoding,
    prompt: str | None,
    progress: Progress,
    slow: bool = False,
    seed: int = 0,
    kept: PartialTexts | None = None,
) -> Result:
    """Scores of the captions of all images, and for NoCaps also of each domain.

    Args:
        records: images, with captions unless the split is withheld.
        prompt: text after the soft prompt; None = the run's own.
        slow: also METEOR and SPICE, which need Java.
        kept: where captions are kept until they are scored; None = nowhere.

    Raises:
        UserError: pycocoevalcap is missing, or an image cannot be opened.
    """
    require("scoring captions", "eval", "pycocoevalcap")  # before minutes are spent on generating captions
    prompt = captioner.settings.language.prompts[0] if prompt is None else prompt

    def generate(rows: slice) -> list[str]:
        images = [record.image for record in records[rows]]
        return captioner.generate(images, [prompt] * len(images), decoding)

    names, how = [str(record.image) for record in records], [prompt, decoding_card(decoding)]
    captions = (kept or PartialTexts()).texts("captions", "pictures", names, GROUP, generate, progress, how)
    progress.doing("scoring")
    result = Result("caption", len(records), seed)
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
    scores = caption_scores(tokens, METRICS if slow else FAST)
    add_domains(result, records, scores.samples)
    counts = bleu_counts(tokens)
    for order, name in enumerate(BLEU, 1):
        result.add_counts(name, counts, partial(bleu, order=order))
    for name in MEANS:
        if name in scores.samples:
            result.add(name, scores.samples[name])
    if "METEOR" in scores.corpus:
        result.alone["METEOR"] = scores.corpus["METEOR"]
    if not slow:
        scores.missing.update(dict.fromkeys(("METEOR", "SPICE"), "not asked for: --slow"))
    result.protocol["not_measured"] = scores.missing
    for n, (row, record) in enumerate(zip(result.samples, records, strict=True)):
        row["references"] = list(record.captions)
        row |= {name: float(each[n]) for name, each in scores.samples.items()}
    return result


def add_domains(result: Result, records: Sequence[Record], samples: Mapping[str, np.ndarray]) -> None:
    """Adds CIDEr-D and SPICE of each domain if the records have domains, as those of NoCaps.

    The CIDEr-D of a domain uses the idf of the entire set. The code of NoCaps' server is not public, but published
    results show this: in all nine rows that were tried (BLIP-2's, BLIP's, VinVL's, SimVLM's, UpDown's), the mean of the
    domains, weighted by their 648, 2,938 and 914 images, equals the overall score up to rounding, by 0.01 points on
    average. With the idf of each domain alone it would differ by tenths or more.
    """
    domains = [(record.facts or {}).get("domain") for record in records]
    if not all(isinstance(domain, str) for domain in domains):
        return
    for domain in dict.fromkeys(domains):
        rows = [n for n, one in enumerate(domains) if one == domain]
        for name in ("CIDEr-D", "SPICE"):
            if name in samples:
                result.add(f"{name}, {domain}", samples[name][rows])
