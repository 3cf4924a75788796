"""From records to batches: captions cleaned, pictures held out, frozen features computed once.

Shapes: B pairs, P patch tokens, V encoder width, S image side in px.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from openblip2.config import RunSettings
from openblip2.data.batches import FeaturePairs, ImagePairs, PairBatch
from openblip2.data.features import FeatureCache, Features, StoredFeatures, find_records
from openblip2.data.records import Record
from openblip2.data.samples import Answers, Captions, Samples, fewer_negations
from openblip2.data.text import clean_caption, clean_question
from openblip2.data.tokens import QFormerTokens
from openblip2.distributed.collectives import is_first, rank, world_size
from openblip2.errors import UserError
from openblip2.hardware import device
from openblip2.model.vision import Vision
from openblip2.model.whitening import Whitening, fit_whitening
from openblip2.progress import Progress
from openblip2.train.checkpoint import read_whitening, save_whitening
from openblip2.train.encode import encode_now, make_cache, open_cache, openable, whitened
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
    records, given = (_usable(part, settings) for part in (records, held_out or ()))
    held, trained = hold_out(records, settings) if held_out is None else (given, records)
    if len(held) < 2 or len(trained) < 2:
        raise UserError(
            f"{len(records)} pictures are too few: at least 2 to train on and 2 held out (data.held_out = "
            f"{settings.data.held_out}) are needed"
        )
    problem = Skipped(run, progress)
    for line in skipped:
        problem(line)

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
    if settings.data.augment and not settings.data.features:
        pairs = ImagePairs(trained, samples_of(trained), batch, seed, size, problem.in_training, part=part)
        return Prepared(pairs, trained, seen.records, lambda: seen, None, pairs.joined)
    features = once(trained)
    pairs = FeaturePairs(features, samples_of(features.records), batch, seed, settings.data.augment, part)
    return Prepared(pairs, features.records, seen.records, lambda: seen, features, pairs.joined)


def hold_out(records: Sequence[Record], settings: RunSettings) -> tuple[list[Record], list[Record]]:
    """The records to validate on and those to train on; which is which the run's seed says."""
    count = min(int(len(records) * settings.data.held_out), settings.data.most_held_out)
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(settings.train.seed)).tolist()
    return [records[n] for n in sorted(order[:count])], [records[n] for n in sorted(order[count:])]


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


def name_long_texts(tokens: QFormerTokens, texts: Sequence[tuple[str, str]], run: Path, progress: Progress) -> None:
    """Counts and names the texts that are cut at the token limit, as the paper cuts them; (id of a picture, text)."""
    long = [texts[n] for n in tokens.too_long([text for _, text in texts])]
    if long and is_first():
        with (run / "skipped.jsonl").open("a", encoding="utf-8") as file:
            for picture, text in long:
                file.write(json.dumps({"cut": f"{picture}: {text}"}) + "\n")
        progress.say(
            f"{len(long)} texts have more than {tokens.longest} tokens and are cut there (data.max_tokens); the "
            f"first is of {long[0][0]}; all are in {run / 'skipped.jsonl'}"
        )
