"""The training recipes of stage 1 and stage 2, for pre-training and fine-tuning; both use the same training loop.

Retrieval is fine-tuned with the recipe of stage 1; captioning, VQA and instructions with that of stage 2.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openblip2.config import RunSettings
from openblip2.data.batches import PairBatch, Prefetcher, drawn_prompts, joined_ids
from openblip2.data.records import Record
from openblip2.data.text import BertTokens, question_tokens
from openblip2.data.web.mixture import Part
from openblip2.distributed.collectives import is_first, world_size
from openblip2.distributed.data_parallel import shard
from openblip2.distributed.launch import first_process_first
from openblip2.errors import UserError
from openblip2.evaluate.health import findings
from openblip2.evaluate.validation import grounding, measure_answers, measure_stage1
from openblip2.hardware import compute_dtype, computing, device
from openblip2.model.bert import bert_tokenizer
from openblip2.model.build import (
    add_adapters,
    build_vision,
    parts_table,
    require_extras,
    set_speed,
    with_parts,
)
from openblip2.model.decoding import try_generation
from openblip2.model.fast.gradient_cache import step_losses
from openblip2.model.language import LanguageModel
from openblip2.model.stage1 import OBJECTIVES, Stage1, see
from openblip2.model.stage2 import Stage2
from openblip2.model.vision import Vision, frozen_vision
from openblip2.progress import Progress
from openblip2.runs import make_folder, write_config
from openblip2.train.bookkeeping import (
    RecordingBatches,
    data_digest,
    name_long_texts,
    name_unknown_texts,
    write_trained_on,
)
from openblip2.train.loop import fit, joint_draws
from openblip2.train.prepare import ASKING, Prepared, prepare, prepare_shards
from openblip2.train.resume import find_checkpoint, forget_checkpoints, require_same
from openblip2.train.start import build_from_start, require_start, tokenizer_to_start
from openblip2.train.warm_start import warm_start_stage1, warm_start_stage2

Batches = Callable[[int], PairBatch]


def train_stage(
    settings: RunSettings,
    records: Sequence[Record],
    run: Path,
    progress: Progress,
    resume: bool = False,
    features: Path | None = None,
    skipped: Sequence[str] = (),
    held_out: Sequence[Record] | None = None,
    shards: Sequence[Part] | None = None,
    vision: Vision | None = None,
    language: LanguageModel | None = None,
) -> None:
    """Trains one stage on records or on shards and writes the run.

    Args:
        settings: The model and how it is trained.
        records: The training data.
        run: The folder to write.
        progress: Receives progress messages.
        resume: Continue from the run's last checkpoint, if it has one; a finished run is not trained again.
        features: The folder where frozen features are kept between runs.
        skipped: One line for each sample left out when the records were read.
        held_out: The validation pictures; None = a share of the training data (`data.held_out`).
        shards: The training data, instead of records.
        vision: An image encoder instead of that of the settings: an `nn.Module` that implements `Vision`. It is frozen.
        language: A language model instead of that of the settings.
    """
    handed_in = None if vision is None else frozen_vision(vision)
    settings = with_parts(settings, handed_in, language)
    # Check everything that can be rejected first, because loading models and encoding pictures takes minutes to hours.
    make_folder(run)
    require_extras(settings)
    require_start(settings, language is not None)
    batch, count = settings.train.batch, world_size()
    if batch < count:
        raise UserError(f"train.batch={batch} is for all {count} processes: give at least one pair for each")
    if run.resolve() in [Path(start).resolve() for start in (settings.start, settings.text_start) if start]:
        raise UserError(f"{run} is the run that training starts from: give another --out")
    last, digest = None, data_digest(records, held_out or ())
    if resume:
        last = find_checkpoint(run, progress.say)
        finished = (run / "model.safetensors").exists()
        if last or finished:
            require_same(settings, run, last, digest)
        if finished:
            progress.say(f"{run} is finished: there is nothing to resume")
            return
        progress.say(f"resuming from {last}" if last else f"{run} has no checkpoint: training starts from step 0")
    else:
        # Before config.json is replaced, because old weights with new settings would look like a finished run.
        forget_checkpoints(run)
    # For weights that are initialised at random; each step sets its own seed (`loop.fit`).
    torch.manual_seed(settings.train.seed)
    progress.doing(f"loading {settings.vision.name}")
    # A frozen encoder is stored in the precision in which it computes. A trained one needs fp32, because AdamW's
    # updates are too small for bf16 weights.
    dtype = compute_dtype(device(), settings.train.precision)
    encoder = handed_in or build_vision(settings, torch.float32 if settings.vision.trained else dtype)
    # Before pictures are encoded, which takes hours, because the model may be rejected.
    model = build_from_start(settings, encoder.to(device()), language, dtype, progress)
    if settings.train.parallel == "ddp":
        _ready(model, settings)
    # The first process counts, encodes and writes; the others then read the same files.
    with first_process_first():
        if shards:
            data = prepare_shards(settings, shards, encoder, run, progress, held_out, resume)
        else:
            data = prepare(settings, records, encoder, run, features or run / "features", progress, skipped, held_out)
    if is_first():
        write_trained_on(None if shards else data.records, run)
    # On a GPU, each batch is made during the step before; on a CPU, that thread would take cores from the model.
    steps, accumulate = settings.train.steps, settings.train.accumulate
    source = data.batches if device().type == "cpu" else Prefetcher(data.batches, steps * accumulate)
    batches = RecordingBatches(source, accumulate)
    if settings.train.parallel != "ddp":
        shard(model, settings, device())
        _ready(model, settings)
    recipe: Any = _stage1 if settings.stage == "stage1" else _stage2
    losses, validate, sparse = recipe(settings, model, data, batches, run, progress, last is None)
    # After all weights are loaded, because adapters freeze them. In fine-tuning the model was built with its adapters.
    if settings.task == "pretraining":
        add_adapters(model, settings)
    set_speed(model, settings)
    for name, count, state in parts_table(model):
        progress.say(f"{name:12} {count:>13,} {state}")
    optim, train = settings.optim, settings.train

    def advise(rows: Sequence[dict[str, Any]]) -> list[str]:
        """One line for each problem in the log that `openblip2 doctor` rates as bad."""
        return [one.in_words() for one in findings(settings, rows) if one.level == "bad"]

    fit(model, losses, run, optim, train, validate, progress, last, batches.samples, sparse, advise, digest)


def _ready(model: Stage1 | Stage2, settings: RunSettings) -> None:
    """Moves the model to the device and tests generation there, so that an unsuitable language model fails early."""
    model.to(device())
    if isinstance(model, Stage2):
        with in_evaluation(model, settings):
            try_generation(model.language, model.connector.tokens, settings.language.prompts[0])


# The losses by batch number, the validation, and whether some batches do not use all trained parameters.
Recipe = tuple[Callable[[int], dict[str, Tensor]], Callable[[], dict[str, Any]], bool]


def _stage1(
    settings: RunSettings, model: Stage1, data: Prepared, batches: Batches, run: Path, progress: Progress, begins: bool
) -> Recipe:
    fine_tunes = settings.task != "pretraining"
    tokenizer = tokenizer_to_start(settings) if fine_tunes else bert_tokenizer(settings.qformer.start)
    tokens = BertTokens(tokenizer, settings.data.max_tokens, model.connector.sizes["positions"])
    name_long_texts(tokens, data.captions(), run, progress)
    if is_first():
        write_config(run, settings, model.connector.sizes)
        tokens.tokenizer.save_pretrained(run / "tokenizer")
    # Not in a resumed run, because its checkpoint has weights that were already trained from the closed-form start.
    if settings.warm_start and begins and not fine_tunes:
        progress.doing("starting in closed form")
        with in_evaluation(model, settings):
            r2 = warm_start_stage1(model, tokens, lambda: some_pairs(model, data, settings))
        progress.say(f"stage 1 started in closed form: R2 {r2:.2f} in the shared space, on the training pictures")
    losses_of = step_losses(model, settings.train.chunk)

    def losses(number: int) -> dict[str, Tensor]:
        batch = batches(number)
        texts, valid = tokens(batch.captions)
        # Hard negatives are drawn by ITC's similarities; until these are useful, ITM learns little from the negatives.
        matches = number >= settings.stage1.itm_start_step * settings.train.accumulate
        return losses_of(
            texts.to(device()),
            valid.to(device()),
            joined_ids(batch, device()),
            **on_device(batch),
            objectives=[name for name in settings.stage1.objectives if name != "itm" or matches],
            generator=joint_draws(settings.train.seed, number),
        )

    def validate() -> dict[str, Any]:
        return measure_stage1(model, tokens, data.held_out_features())

    # If one of the three losses is left out, its head gets no gradient.
    sparse = len(settings.stage1.objectives) < len(OBJECTIVES) or settings.stage1.itm_start_step > 0
    return losses, validate, sparse


def _stage2(
    settings: RunSettings, model: Stage2, data: Prepared, batches: Batches, run: Path, progress: Progress, begins: bool
) -> Recipe:
    wording, reads_prompts, seed = settings.language, settings.reads_prompts, settings.train.seed
    tokens = None
    if settings.qformer.question_in_qformer:
        most = settings.data.max_tokens, model.connector.sizes["positions"]
        tokens = BertTokens(tokenizer_to_start(settings), *most)
        form = max(wording.questions, key=len, default=wording.question) if reads_prompts else "{}"
        name_long_texts(tokens, data.questions(form), run, progress)
        if is_first():
            tokens.tokenizer.save_pretrained(run / "tokenizer")
    name_unknown_texts(model.language.tokenizer, [*data.captions(), *data.questions()], run, progress)
    if settings.warm_start and begins and settings.task == "pretraining":
        progress.doing("starting in closed form")
        with in_evaluation(model, settings):
            r2 = warm_start_stage2(model, some_pairs(model, data, settings))
        progress.say(f"projection started in closed form: R2 {r2:.2f} on the training pictures")
    if is_first():
        write_config(run, settings, model.connector.sizes)
    losses_of = step_losses(model, settings.train.chunk)
    # One caption per picture, because a soft token cannot match two words at once; the longest has the most detail.
    aligned = settings.stage2.lm_start_step * settings.train.accumulate
    longest = {record.id: max(record.captions, key=len) for record in data.records} if aligned else {}
    words = model.word_table(longest.values()) if aligned else None

    def losses(number: int) -> dict[str, Tensor]:
        batch = batches(number)
        draws = joint_draws(settings.train.seed, number)
        if settings.stage2.elastic_tokens:  # drawn first, so that all processes draw the same number
            model.first = int(torch.randint(1, model.connector.tokens + 1, (), generator=draws))
        if batch.questions is None:
            asked = drawn_prompts(wording.prompts, len(batch.captions), draws)
        elif settings.task == "instruct":
            asked = batch.questions  # whole instructions, which the Q-Former also reads
        else:
            asked = [wording.question.replace("{}", question) for question in batch.questions]
        given = on_device(batch) | {"question": question_tokens(tokens, batch.questions, device()), "generator": draws}
        if words is None:
            return losses_of(asked, batch.captions, **given)  # for VQA and instructions, captions include answers
        # The language model is trained on the same captions, so it only has to repeat the words of the soft prompt.
        # Alignment continues, because without it the soft tokens drift away from the words (docs/decisions.md).
        captions = [longest[name] for name in batch.names or ()]
        parts = losses_of(asked, captions, words=words, **given)
        return parts if number < aligned else parts | losses_of(asked, captions, **given)

    def validate() -> dict[str, Any]:
        model.first = None
        if settings.task in ASKING:
            return measure_answers(model, tokens, data.held_out_features(), wording.question, seed, reads_prompts)
        return grounding(model, data.held_out_features(), seed, wording.prompts[0])

    # If the Q-Former reads the question, the question's rows of its last layer are not used and get no gradient.
    return losses, validate, settings.qformer.question_in_qformer


@contextmanager
def in_evaluation(model: nn.Module, settings: RunSettings) -> Iterator[None]:
    """Runs the block without dropout and gradients, in the precision of training."""
    model.eval()
    with torch.no_grad(), computing(model, settings.train.precision):
        yield
    model.train()


def some_pairs(model: Stage1 | Stage2, data: Prepared, settings: RunSettings) -> Iterator[tuple[Tensor, list[str]]]:
    """Yields features `[B, P, V]` and B captions of the first batches, up to 4000 training pictures."""
    # Joined batches of all processes: each process solves the same equations, so nothing has to be sent.
    for number in range(-(-min(4000, data.pictures) // settings.train.batch)):
        batch = data.batches(number, joined=True)
        yield see(model.vision, **on_device(batch)), batch.captions


def on_device(batch: PairBatch) -> dict[str, Any]:
    """The pictures of a batch as model arguments: images or features, on the device."""
    return {
        "images": None if batch.images is None else batch.images.to(device(), non_blocking=True),
        "features": None if batch.features is None else batch.features.to(device(), non_blocking=True),
    }
