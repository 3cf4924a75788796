"""From records to batches: captions cleaned, pictures held out, frozen features computed once.

Shapes: B pairs, P patch tokens, V encoder width, S image side in px.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from openblip2.config import RunSettings
from openblip2.data.batches import ImagePairs, PairBatch
from openblip2.data.feature_cache import FeatureCache
from openblip2.data.features import FeaturePairs, Features, StoredFeatures, find_records
from openblip2.data.records import Record
from openblip2.data.samples import Answers, Captions, Samples, fewer_negations
from openblip2.data.text import MAX_WORDS, clean_caption, clean_question
from openblip2.data.tokens import QFormerTokens, only_unknown
from openblip2.distributed.collectives import is_first, rank, world_size
from openblip2.errors import UserError
from openblip2.hardware import device
from openblip2.model.vision import Vision
from openblip2.model.whitening import Whitening, fit_whitening
from openblip2.progress import Progress
from openblip2.train.encode import encode_now, make_cache, open_cache, openable, whitened
from openblip2.train.parameters import read_whitening, save_whitening
from openblip2.train.skipped import Skipped

WHITENING_PICTURES = 256  # enough for a covariance: each has a hundred patches and more


@dataclass(frozen=True)
class Prepared:
    """Training batches by number, the pictures they are drawn from, and those held out.

    `held_out`: their features, as the image encoder now is: another one whenever it trains.
    """

    batches: Callable[[int], PairBatch]
    records: Sequence[Record]
    kept_back: Sequence[Record]
    held_out: Callable[[], Features]
    features: StoredFeatures | None  # of the training pictures, when they are computed once
    joined: Callable[[int], PairBatch]  # the batches of all processes together
    samples: int = 0  # of shards, which have no records
    digest: str = ""  # `data.trained_on.data_digest`

    @property
    def pictures(self) -> int:
        """How many there are to train on."""
        return self.samples or len(self.records)


def prepare(
    settings: RunSettings,
    records: Sequence[Record],
    vision: Vision,
    run: Path,
    kept: Path,
    progress: Progress,
    skipped: Sequence[str] = (),
    held_out: Sequence[Record] | None = None,
) -> Prepared:
    """Cleans texts, holds pictures out, and computes the features that are computed once.

    They come from the cache `data.features`, or else from one in `kept`, which is made if it is not there. Of several
    processes the first comes first, and writes; the others then read what it has made.

    `skipped`: one line for each sample that was left out before; they and those left out here are named in
    `run/skipped.jsonl` and counted; what process 3 leaves out while it trains is in `run/skipped-3.jsonl`.
    `held_out`: the pictures to validate on, instead of a share of the records.
    """
    asks = settings.task == "vqa"
    whole = [*records, *(held_out or ())]
    records, given = (_usable(part, settings) for part in (records, held_out or ()))
    held, trained = hold_out(records, settings) if held_out is None else (given, records)
    problem = Skipped(run, progress)
    for line in skipped:
        problem(line)
    _require_enough(held, trained, settings, problem, held_out is None)
    _name_cut_texts(whole, run, progress)

    def samples_of(part: Sequence[Record]) -> Samples:
        return Answers(part, settings.data.balance) if asks else Captions(part)

    batch, seed, size = settings.train.batch, settings.train.seed, settings.vision.image_size
    part = (rank(), world_size())
    if batch < world_size():
        raise UserError(f"train.batch={batch} is the batch of all {world_size()} processes: at least one pair for each")
    if settings.vision.trained:
        if settings.data.features:
            raise UserError(f"data.features={settings.data.features}: an encoder that trains has no features to keep")
        if settings.vision.whiten:
            vision.whitening = read_whitening(Path(str(settings.start))).to(device())
            if is_first():
                save_whitening(vision.whitening, run)
        good, problems = openable(held, size)
        for line in problems:
            problem(line)
        _require_enough(good, trained, settings, problem)
        augment = settings.data.augment
        pairs = ImagePairs(trained, samples_of(trained), batch, seed, size, problem.in_training, augment, part)
        return Prepared(pairs, trained, good, lambda: encode_now(vision, good), None, pairs.joined)

    sample = trained[:: -(-len(trained) // WHITENING_PICTURES)]
    if settings.data.features:
        cache = open_cache(vision, settings, Path(settings.data.features))
    elif not is_first():
        cache = FeatureCache(kept / "pictures")
    else:
        encoded = [*held, *sample] if settings.data.augment else [*records, *given]
        cache = make_cache(vision, encoded, settings, kept / "pictures", progress, "pictures", replace=True)
    if settings.vision.whiten:
        vision.whitening = whitening_for(settings, cache, sample, run).to(device())
    finish = whitened(vision)

    def once(part: list[Record]) -> StoredFeatures:
        found, problems = find_records(part, cache, finish)
        for line in problems:
            problem(line)
        return found

    seen = once(held).load()
    _require_enough(seen.records, trained, settings, problem)
    if settings.data.augment and not settings.data.features:
        pairs = ImagePairs(trained, samples_of(trained), batch, seed, size, problem.in_training, part=part)
        return Prepared(pairs, trained, seen.records, lambda: seen, None, pairs.joined)
    features = once(trained)
    _require_enough(seen.records, features.records, settings, problem)
    if batch > len(features.records) and not asks:
        progress.say(f"train.batch={batch}: there are {len(features.records)} training pictures, a batch has no more")
    pairs = FeaturePairs(features, samples_of(features.records), batch, seed, settings.data.augment, part)
    return Prepared(pairs, features.records, seen.records, lambda: seen, features, pairs.joined)


def hold_out(records: Sequence[Record], settings: RunSettings) -> tuple[list[Record], list[Record]]:
    """The records to validate on and those to train on; which is which the run's seed says."""
    count = min(int(len(records) * settings.data.held_out), settings.data.most_held_out)
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(settings.train.seed)).tolist()
    return [records[n] for n in sorted(order[:count])], [records[n] for n in sorted(order[count:])]


def _require_enough(
    held: Sequence[Record], trained: Sequence[Record], settings: RunSettings, skipped: Skipped, share: bool = False
) -> None:
    """Two pictures to train on and two to validate on, or an error. `share`: whether `data.held_out` may help."""
    if len(held) >= 2 and len(trained) >= 2:
        return
    count, left_out = len(held) + len(trained), f" ({skipped.count:,} more were skipped)" if skipped.count else ""
    remedy = "give more pictures"
    if share and count >= 4:
        held_out = math.ceil(200 / count) / 100
        batch = min(settings.train.batch, count - int(count * held_out))
        remedy = f"add --set data.held_out={held_out}"
        remedy += f" --set train.batch={batch}" if batch < settings.train.batch else ""
    raise UserError(
        f"{count:,} pictures{left_out} are too few: {len(trained)} to train on and {len(held)} held out (data.held_out="
        f"{settings.data.held_out}), at least 2 of each are needed; {remedy}"
    )


def _usable(records: Sequence[Record], settings: RunSettings) -> list[Record]:
    """The records with their texts cleaned; for VQA those with questions that are to be asked."""
    records = [cleaned(record) for record in records]
    if settings.task != "vqa":
        return records
    return [record for record in fewer_negations(records, settings.data.negations) if record.questions]


def cleaned(record: Record) -> Record:
    """A record with its texts as models learn them."""
    questions = tuple(
        replace(q, text=clean_question(q.text), answers=tuple(clean_caption(answer) or answer for answer in q.given))
        for q in record.questions
    )
    return replace(record, captions=tuple(clean_caption(c) for c in record.captions), questions=questions)


def whitening_for(settings: RunSettings, cache: FeatureCache, sample: Sequence[Record], run: Path) -> Whitening:
    """The run's whitening: the stage-1 run's if there is one to start from, else fitted to some training pictures."""
    if not is_first():
        return read_whitening(run)
    if settings.start:
        found = read_whitening(Path(settings.start))
    else:
        raw, _ = find_records(sample, cache, lambda features: features)
        found = fit_whitening(raw.load().values)
    save_whitening(found, run)
    return found


def captions_of(data: Prepared) -> list[tuple[str, str]]:
    """All captions, each behind the id of its picture."""
    return [(record.id, caption) for record in (*data.records, *data.kept_back) for caption in record.captions]


def questions_of(data: Prepared) -> list[tuple[str, str]]:
    """All questions, each behind the id of its picture."""
    return [(record.id, q.text) for record in (*data.records, *data.kept_back) for q in record.questions]


def name_texts(tokenizer: Any, texts: Sequence[tuple[str, str]], run: Path, progress: Progress) -> None:
    """Counts and names the texts of which a tokenizer leaves nothing; (id of a picture, text)."""
    unknown = [texts[n] for n in only_unknown(tokenizer, [text for _, text in texts])]
    share = f"of {len(texts):,} ({100 * len(unknown) / max(1, len(texts)):.1f} %) have no word that the tokenizer knows"
    _name("unknown", unknown, f"{share} and become only {tokenizer.unk_token}", run, progress)


def name_long_texts(tokens: QFormerTokens, texts: Sequence[tuple[str, str]], run: Path, progress: Progress) -> None:
    """Counts and names the texts that are cut at the token limit, as the paper cuts them, and those of `name_texts`."""
    long = [texts[n] for n in tokens.too_long([text for _, text in texts])]
    _name("cut", long, f"have more than {tokens.longest} tokens and are cut there (data.max_tokens)", run, progress)
    name_texts(tokens.tokenizer, texts, run, progress)


def _name_cut_texts(records: Sequence[Record], run: Path, progress: Progress) -> None:
    """Counts and names the texts of which `cleaned` leaves the first 50 words."""
    texts = [(r.id, clean_caption(text, len(text)), text) for r in records for text in r.captions]
    texts += [(r.id, clean_question(q.text, len(q.text)), q.text) for r in records for q in r.questions]
    long = [(picture, text) for picture, whole, text in texts if len(whole.split()) > MAX_WORDS]
    _name("cut", long, f"have more than {MAX_WORDS} words and are cut there", run, progress)


def _name(key: str, texts: Sequence[tuple[str, str]], what: str, run: Path, progress: Progress) -> None:
    if not texts or not is_first():
        return
    with (run / "skipped.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({key: f"{picture}: {text}"}) + "\n" for picture, text in texts)
    progress.say(f"{len(texts):,} texts {what}; the first is of {texts[0][0]}; all are in {run / 'skipped.jsonl'}")
