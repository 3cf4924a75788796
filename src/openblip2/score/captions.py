"""Captions scored as in the paper (4.2): BLEU, METEOR, ROUGE-L, CIDEr and SPICE against people's captions."""

from collections.abc import Sequence
from functools import partial

from openblip2.captioner import Captioner
from openblip2.data.records import Record
from openblip2.evaluate.caption_metrics import (
    BLEU,
    ENTIRE,
    FAST,
    METRICS,
    bleu,
    bleu_counts,
    caption_scores,
    cut,
    domain_scores,
)
from openblip2.model.decoding import Decoding
from openblip2.model.extras import require
from openblip2.progress import Progress
from openblip2.score.answers import WITHHELD
from openblip2.score.card import decoding_card
from openblip2.score.result import Result
from openblip2.score.resume import Kept

GROUP = 64  # pictures between two looks at the progress
# Of these the corpus score is the mean of the pictures', and so its interval that of a mean.
MEANS = ("ROUGE-L", "CIDEr-D", "SPICE")


def score_captions(
    captioner: Captioner,
    records: Sequence[Record],
    decoding: Decoding,
    prompt: str | None,
    progress: Progress,
    slow: bool = False,
    seed: int = 0,
    kept: Kept | None = None,
) -> Result:
    """Scores of the captions of all pictures; of NoCaps also of each domain.

    Args:
        prompt: behind the soft prompt; None = the one of training.
        slow: METEOR and SPICE, too, which need Java.
        kept: where captions are kept until they are scored; None = nowhere.

    Raises:
        UserError: pycocoevalcap is missing, or a picture cannot be opened.
    """
    require("scoring captions", "eval", "pycocoevalcap")  # before minutes are spent on writing them
    prompt = captioner.settings.language.prompts[0] if prompt is None else prompt

    def write(rows: slice) -> list[str]:
        images = [record.image for record in records[rows]]
        return captioner.generate(images, [prompt] * len(images), decoding)

    names, how = [str(record.image) for record in records], [prompt, decoding_card(decoding)]
    written = (kept or Kept()).texts("captions", "pictures", names, GROUP, write, progress, how)
    progress.doing("scoring")
    result = Result("caption", len(records), seed)
    result.protocol |= decoding_card(decoding) | {"prompt": prompt}
    if not all(record.captions for record in records):
        result.warnings.append(WITHHELD)
        result.samples += [
            {"image": record.id, "caption": caption} for record, caption in zip(records, written, strict=True)
        ]
        return result
    tokens = cut(written, [record.captions for record in records])
    result.protocol |= {
        "captions_each": sorted({len(record.captions) for record in records}),
        "tokeniser": tokens.by,
        "cider": "CIDEr-D, idf of the captions scored",
    }
    wanted = METRICS if slow else FAST
    domains = [(record.facts or {}).get("domain") for record in records]
    if all(isinstance(domain, str) for domain in domains):
        parts = domain_scores(tokens, [str(domain) for domain in domains], wanted)
        whole = parts.pop(ENTIRE)
        for domain, found in parts.items():
            result.add(f"CIDEr-D, {domain}", found.samples["CIDEr-D"])
            if "SPICE" in found.samples:
                result.add(f"SPICE, {domain}", found.samples["SPICE"])
    else:
        whole = caption_scores(tokens, wanted)
    counts = bleu_counts(tokens)
    for order, name in enumerate(BLEU, 1):
        result.add_counts(name, counts, partial(bleu, order=order))
    for name in MEANS:
        if name in whole.samples:
            result.add(name, whole.samples[name])
    if "METEOR" in whole.corpus:
        result.alone["METEOR"] = whole.corpus["METEOR"]
    if not slow:
        whole.missing.update(dict.fromkeys(("METEOR", "SPICE"), "not asked for: --slow"))
    result.protocol["not_measured"] = whole.missing
    result.samples += [
        {"image": record.id, "caption": caption, "references": list(record.captions)}
        | {name: float(each[n]) for name, each in whole.samples.items()}
        for n, (record, caption) in enumerate(zip(records, written, strict=True))
    ]
    return result
