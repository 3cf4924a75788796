"""Turns records or shards into batches: cleans texts, holds pictures out, and computes frozen features once.

RUN/shards.json   the shards and the number of samples in each, so that the order of samples is the same in every
                  process and after every start (data/web/mixture.py)
RUN/held_out/     with shards: the validation pictures, as a data folder that `evaluate --data` also accepts

Shapes: B pairs, P patch tokens, V encoder width, S image side in px.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from openblip2.config import RunSettings
from openblip2.data.batches import Batches, FeaturePairs, ImagePairs
from openblip2.data.features import FeatureCache, Features, StoredFeatures, find_records
from openblip2.data.records import Record, read_records
from openblip2.data.samples import Answers, Captions, Instructions, Samples, fewer_negations
from openblip2.data.text import clean_answer, clean_caption, clean_question, plain_question
from openblip2.data.web import mixture
from openblip2.data.web.mixture import Part
from openblip2.data.web.pairs import ShardPairs
from openblip2.distributed.collectives import is_first, rank, world_size
from openblip2.errors import UserError, number_of
from openblip2.hardware import device
from openblip2.model.vision import FrozenVision
from openblip2.progress import Progress
from openblip2.train.bookkeeping import Skipped, name_wordy_texts
from openblip2.train.encode import encode_now, make_cache, open_cache, openable, whitened
from openblip2.train.parameters import whitening_of_run

HELD_OUT = "held_out"
ASKING = ("vqa", "instruct")  # tasks that need questions
WHITENING_PICTURES = 256  # enough for a covariance, because each has a hundred patches or more


@dataclass(frozen=True)
class Prepared:
    """The training and validation data of a run."""

    # By number: this process's part, or with `joined` those of all processes together.
    batches: Batches | ShardPairs
    records: Sequence[Record]  # the training pictures; empty with shards
    held_out: Sequence[Record]  # the validation pictures
    # Returns their features with the image encoder's current weights, which training may change.
    held_out_features: Callable[[], Features]
    samples: int = 0  # in the shards

    @property
    def pictures(self) -> int:
        """Number of training pictures."""
        return self.samples or len(self.records)

    def captions(self) -> list[tuple[str, str]]:
        """All captions, as (picture id, caption)."""
        return [(record.id, caption) for record in (*self.records, *self.held_out) for caption in record.captions]

    def questions(self, form: str = "{}") -> list[tuple[str, str]]:
        """All questions, inserted into a form, as (picture id, question)."""
        records = (*self.records, *self.held_out)
        return [(record.id, form.replace("{}", q.text)) for record in records for q in record.questions]


def prepare(
    settings: RunSettings,
    records: Sequence[Record],
    vision: FrozenVision,
    run: Path,
    cache_folder: Path,
    progress: Progress,
    skipped: Sequence[str] = (),
    held_out: Sequence[Record] | None = None,
) -> Prepared:
    """Cleans texts, holds pictures out, and computes the features that need to be computed only once.

    With several processes, the first one calls this first and writes files, which the others then read.

    Args:
        run: The run's folder; left-out samples are listed in its `skipped.jsonl` (`train/bookkeeping.py`).
        cache_folder: The folder of the feature cache, which is created if needed; `data.features` takes precedence.
        skipped: One line for each sample that was left out before.
        held_out: The validation pictures; None = a share of the records.
    """
    everything = [*records, *(held_out or ())]
    records, validation = (_usable(part, settings) for part in (records, held_out or ()))
    held, trained = hold_out(records, settings) if held_out is None else (validation, records)
    skip = Skipped(run, progress)
    skip(*skipped)
    _require_enough(held, trained, settings, skip, held_out is None)
    name_wordy_texts(everything, run, progress)  # the original texts, because those of `records` are already cut

    def samples_of(part: Sequence[Record]) -> Samples:
        if settings.task == "instruct":
            forms = settings.language.questions or (settings.language.question,)
            return Instructions(part, settings.language.prompts, forms, settings.data.caption_share)
        return Answers(part, settings.data.balance) if settings.task == "vqa" else Captions(part)

    batch, seed, size = settings.train.batch, settings.train.seed, settings.vision.image_size
    augment = settings.data.augment
    similar = settings.stage1.similar_start_step if settings.stage == "stage1" else None
    similar_from = None if similar is None else similar * settings.train.accumulate
    how = {"augmented": augment, "part": (rank(), world_size()), "similar_from": similar_from}
    if settings.vision.trained:
        if settings.data.features:
            raise UserError(f"data.features={settings.data.features} needs vision.trained=false (a frozen encoder)")
        if settings.vision.whiten:
            vision.whitening = whitening_of_run(settings, run).to(device())
        held, problems = openable(held, size)
        skip(*problems)
        _require_enough(held, trained, settings, skip)
        # Features change with the encoder, so pictures are opened in every step.
        pairs = ImagePairs(trained, samples_of(trained), batch, seed, size, skip.in_training, **how)
        return Prepared(pairs, trained, held, lambda: encode_now(vision, held))

    # Evenly spread over the training pictures; held-out pictures are never used.
    sample = trained[:: -(-len(trained) // WHITENING_PICTURES)]
    if settings.data.features:
        cache = open_cache(vision, settings, Path(settings.data.features))
    elif not is_first():  # the first process has made it
        cache = FeatureCache(cache_folder / "pictures")
    else:
        # Augmented pictures differ in every epoch, so only the plain ones for validation and whitening are cached.
        encoded = [*held, *sample] if augment else [*records, *validation]
        cache = make_cache(vision, encoded, settings, cache_folder / "pictures", progress, "pictures", replace=True)
    if settings.vision.whiten:
        # Features are cached before whitening, so that one cache serves runs with and without it.
        unwhitened = lambda: find_records(sample, cache, lambda features: features)[0].load().values  # noqa: E731
        vision.whitening = whitening_of_run(settings, run, unwhitened).to(device())
    finish = whitened(vision)

    def stored(part: list[Record]) -> StoredFeatures:
        features, problems = find_records(part, cache, finish)
        skip(*problems)
        return features

    held_features = stored(held).load()
    _require_enough(held_features.records, trained, settings, skip)  # without those that cannot be opened
    # If the user's cache has crops, no picture has to be opened in training.
    if augment and not settings.data.features:
        pairs = ImagePairs(trained, samples_of(trained), batch, seed, size, skip.in_training, **how)
        return Prepared(pairs, trained, held_features.records, lambda: held_features)
    features = stored(trained)
    _require_enough(held_features.records, features.records, settings, skip)
    if batch > len(features.records) and settings.task != "vqa":
        progress.say(f"train.batch={batch} is reduced: there are only {len(features.records)} training pictures")
    pairs = FeaturePairs(features, samples_of(features.records), batch, seed, **how)
    return Prepared(pairs, features.records, held_features.records, lambda: held_features)


def prepare_shards(
    settings: RunSettings,
    parts: Sequence[Part],
    vision: FrozenVision,
    run: Path,
    progress: Progress,
    held_out: Sequence[Record] | None = None,
    resume: bool = False,
) -> Prepared:
    """Counts the samples of shards, holds pictures out, and makes the batches; pictures are encoded in each step.

    Args:
        parts: The shards, not counted yet.
        held_out: The validation pictures; None = the first samples of the first part: a share `data.held_out` of its
            samples, but at most `data.most_held_out`.
        resume: Use the counts in the run's folder.

    Raises:
        UserError: A setting that shards do not support, no sample, or fewer than 2 validation pictures.
    """
    if settings.task not in ("pretraining", "caption", "retrieval"):
        raise UserError(f"{settings.task} cannot use shards, which contain only captions: give --data with questions")
    if settings.stage2.lm_start_step:
        raise UserError("stage2.lm_start_step needs all captions before the first step, so set it to 0 for shards")
    if settings.data.features:
        raise UserError("--features cannot be used with shards, whose pictures are encoded in each step")
    skip = Skipped(run, progress)
    # The order of samples depends on the counts, so all processes and all starts of a run must use the same ones.
    counted = mixture.kept_parts(run, parts) if resume or not is_first() else None
    if counted is None:
        with progress.steps("counting shards", sum(len(part.shards) for part in parts), unit="shards") as bar:
            counted = mixture.count_parts(parts, skip, bar.advance)
        if held_out is None:
            wanted = min(int(counted[0].samples * settings.data.held_out), settings.data.most_held_out)
            counted = mixture.hold_out_samples(counted, wanted)
            mixture.write_held_out(counted[0], wanted, run / HELD_OUT, skip)
        mixture.write_parts(counted, run)  # last, so that a start that ended before this counts again
    if held_out is None:
        held_out, _ = read_records(run / HELD_OUT)
    samples = sum(part.samples for part in counted)
    progress.say(f"{number_of(samples, 'sample')} of {number_of(sum(len(p.shards) for p in counted), 'shard')}")
    # They are few enough to be decoded now, so that validation always uses the same pictures.
    progress.doing("encoding the held-out pictures")
    name_wordy_texts(held_out, run, progress)
    held, problems = openable([cleaned(record) for record in held_out], settings.vision.image_size)
    skip(*problems)
    if len(held) < 2:
        raise UserError(
            f"{number_of(len(held), 'picture')} to validate on can be opened; 2 are needed (--held-out, data.held_out)"
        )
    batch, seed, size = settings.train.batch, settings.train.seed, settings.vision.image_size
    data, part = settings.data, (rank(), world_size())
    pairs = ShardPairs(counted, batch, seed, size, data.open_shards, skip.in_training, data.augment, part)
    if settings.vision.whiten:
        vision.whitening = whitening_of_run(settings, run, lambda: _first_features(vision, pairs)).to(device())
    if settings.vision.trained:
        return Prepared(pairs, [], held, lambda: encode_now(vision, held), samples)
    # A frozen encoder gives the same features in each validation, so they are computed once.
    with torch.no_grad():
        held_features = encode_now(vision, held)
    return Prepared(pairs, [], held, lambda: held_features, samples)


def hold_out(records: Sequence[Record], settings: RunSettings) -> tuple[list[Record], list[Record]]:
    """Splits the records at random, with the run's seed, into validation records and training records."""
    count = min(int(len(records) * settings.data.held_out), settings.data.most_held_out)
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(settings.train.seed)).tolist()
    # In the order of the records, because batches are drawn by position.
    return [records[n] for n in sorted(order[:count])], [records[n] for n in sorted(order[count:])]


def _require_enough(
    held: Sequence[Record], trained: Sequence[Record], settings: RunSettings, skipped: Skipped, share: bool = False
) -> None:
    """Requires two training and two validation pictures. `share`: whether another `data.held_out` may help."""
    if len(held) >= 2 and len(trained) >= 2:
        return
    count, left_out = len(held) + len(trained), f" ({skipped.count:,} more were skipped)" if skipped.count else ""
    few = f"{number_of(count, 'picture')}{left_out} {'is' if count == 1 else 'are'} too few"
    remedy = "give more pictures"
    # With 4 pictures or more, a share can leave 2 on each side. It is rounded up to whole percents.
    if share and count >= 4:
        held_out = math.ceil(200 / count) / 100
        batch = min(settings.train.batch, count - int(count * held_out))
        remedy = f"add --set data.held_out={held_out}"
        remedy += f" --set train.batch={batch}" if batch < settings.train.batch else ""
    raise UserError(
        f"{few}: {len(trained)} to train on and {len(held)} held out (data.held_out={settings.data.held_out}), at "
        f"least 2 of each are needed; {remedy}"
    )


def _usable(records: Sequence[Record], settings: RunSettings) -> list[Record]:
    """The records with cleaned texts; for VQA and instructions, only those with questions to be asked."""
    records = [cleaned(record, settings.reads_prompts) for record in records]
    if settings.task not in ASKING:
        return records
    asked = [record for record in fewer_negations(records, settings.data.negations) if record.questions]
    if records and not asked:
        raise UserError(f"{settings.task}: none of {len(records)} pictures has a question; give --data with questions")
    if asked and settings.task == "instruct" and not any(record.captions for record in asked):
        raise UserError(
            f"instruct mixes captions and questions: none of {len(asked)} pictures with questions has a caption; add "
            "captions to --data, or use train vqa"
        )
    return asked


def cleaned(record: Record, as_written: bool = False) -> Record:
    """A record with its texts cleaned; `as_written`: questions keep capitals and punctuation, as in an instruction."""
    clean = plain_question if as_written else clean_question
    questions = tuple(
        replace(q, text=clean(q.text), answers=tuple(map(clean_answer, q.given))) for q in record.questions
    )
    return replace(record, captions=tuple(clean_caption(c) for c in record.captions), questions=questions)


def _first_features(vision: FrozenVision, pairs: ShardPairs) -> Tensor:
    """Features `[N, P, V]` of the first batches."""
    # From the batches of all processes, so that the whitening does not depend on the number of processes.
    features: list[Tensor] = []
    with torch.no_grad():
        while sum(map(len, features)) < WHITENING_PICTURES:
            images = pairs(len(features), joined=True).images
            assert images is not None
            features.append(vision(images.to(device())).cpu())
    return torch.cat(features)
