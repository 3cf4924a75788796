"""The two recipes: what stage 1 and stage 2 do with the same loop."""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openblip2.config import RunSettings, change, from_dict, to_dict
from openblip2.data.batches import FeaturePairs, ImagePairs, PairBatch
from openblip2.data.features import Features, compute_features
from openblip2.data.records import Record
from openblip2.data.text import clean_caption
from openblip2.data.tokens import QFormerTokens
from openblip2.errors import UserError
from openblip2.evaluate.grounding import grounding
from openblip2.evaluate.stage1 import measure_stage1
from openblip2.model.build import build_stage1, build_stage2, build_vision, parts_table
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.model.vision import Vision
from openblip2.model.whitening import Whitening, fit_whitening
from openblip2.train.checkpoint import (
    last_checkpoint,
    make_folder,
    read_config,
    read_tensors,
    read_whitening,
    save_whitening,
    trained_parameters,
    write_json,
)
from openblip2.train.loop import Log, autocast, compute_dtype, fit
from openblip2.train.progress import Progress
from openblip2.train.warm_start import warm_start

TEXT_PATH = ("qformer.words.", "qformer.positions.", ".text_ffn.")  # of a stage-1 run; stage 2 leaves it out
WHITENING_PICTURES = 256  # enough for a covariance: each has a hundred patches and more
HEADS = ("image_head.", "text_head.", "match_head.", "word_head.", "temperature")


def device() -> torch.device:
    """Where training runs: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(
    settings: RunSettings,
    records: Sequence[Record],
    run: Path,
    progress: Progress,
    resume: bool = False,
    features: Path | None = None,
) -> None:
    """Trains one stage on records and writes the run. `features`: where frozen features are kept between runs."""
    make_folder(run)
    if settings.start:  # before minutes are spent on features
        _require_start(settings)
    if resume:
        _require_same(settings, run)
    torch.manual_seed(settings.train.seed)
    recipe = _stage1 if settings.stage == "stage1" else _stage2
    recipe(settings, records, run, progress, resume, features or run / "features")


def _stage1(
    settings: RunSettings,
    records: Sequence[Record],
    run: Path,
    progress: Progress,
    resume: bool,
    features: Path,
) -> None:
    from transformers import AutoTokenizer

    from openblip2.model.wheels import locate

    vision = build_vision(settings, compute_dtype(device(), settings.train.precision)).to(device())
    data = prepare(settings, records, vision, run, features, progress)
    model = build_stage1(settings, vision).to(device())
    tokens = QFormerTokens(AutoTokenizer.from_pretrained(locate(settings.qformer.start)), settings.data.max_tokens)
    name_long_captions(tokens, data.records, run, progress)
    write_config(run, settings, model.qformer)
    tokens.tokenizer.save_pretrained(run / "tokenizer")
    show_parts(model, progress)

    def losses(number: int) -> dict[str, Tensor]:
        batch = data.batches(number)
        texts, valid = tokens(batch.captions)
        return model.losses(
            texts.to(device()),
            valid.to(device()),
            batch.ids.to(device()),
            **seen(batch),
            with_matching=number >= settings.stage1.matching_from * settings.train.accumulate,
        )

    def validate() -> dict[str, Any]:
        return measure_stage1(model, tokens, data.held_out, settings.train.seed)

    fit(model, losses, run, settings.optim, settings.train, validate, progress, resume)


def _stage2(
    settings: RunSettings,
    records: Sequence[Record],
    run: Path,
    progress: Progress,
    resume: bool,
    features: Path,
) -> None:
    dtype = compute_dtype(device(), settings.train.precision)
    vision = build_vision(settings, dtype).to(device())
    data = prepare(settings, records, vision, run, features, progress)
    model = build_stage2(settings, vision, dtype=dtype).to(device())
    if settings.start:
        start_from_stage1(model, Path(settings.start))
    if settings.warm_start and not resume:
        r2 = warm_start_from(model, data, settings)
        progress.say(f"projection started in closed form: R2 {r2:.2f} on the training pictures")
    write_config(run, settings, model.qformer)
    show_parts(model, progress)
    prompts = settings.language.prompts

    def losses(number: int) -> dict[str, Tensor]:
        batch = data.batches(number)
        drawn = [prompts[int(torch.randint(len(prompts), ()))] for _ in batch.captions]
        return model.losses(drawn, batch.captions, **seen(batch))

    def validate() -> dict[str, Any]:
        return grounding(model, data.held_out, settings.train.seed, prompts[0]).as_log()

    fit(model, losses, run, settings.optim, settings.train, validate, progress, resume)


@dataclass(frozen=True)
class Prepared:
    """Training batches by number, the pictures they are drawn from, and the held-out pictures."""

    batches: Callable[[int], PairBatch]
    records: Sequence[Record]
    held_out: Features
    features: Features | None  # of the training pictures, when they are computed once


def prepare(
    settings: RunSettings,
    records: Sequence[Record],
    vision: Vision,
    run: Path,
    kept: Path,
    progress: Progress,
) -> Prepared:
    """Cleans captions, holds pictures out, and computes the features that are computed once."""
    records = [replace(r, captions=tuple(clean_caption(c) for c in r.captions)) for r in records]
    count = min(int(len(records) * settings.data.held_out), settings.data.most_held_out)
    if count < 2 or len(records) - count < 2:
        raise UserError(
            f"{len(records)} pictures are too few: at least 2 to train on and 2 held out (data.held_out = "
            f"{settings.data.held_out}) are needed"
        )
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(settings.train.seed)).tolist()
    held, trained = [records[n] for n in sorted(order[:count])], [records[n] for n in sorted(order[count:])]

    def problem(line: str) -> None:
        skipped.write({"skipped": line})
        progress.say(f"skipped: {line}")

    run.mkdir(parents=True, exist_ok=True)
    skipped = Log(run / "skipped.jsonl")

    if settings.vision.whiten:
        vision.whitening = whitening_for(settings, vision, trained, run, kept, progress).to(device())

    def once(part: list[Record], name: str) -> Features:
        found = encode_all(vision, part, settings, kept / f"{name}.safetensors", name, progress)
        for line in found[1]:
            problem(line)
        return found[0]

    held_out = once(held, "held-out")
    if settings.data.augment:
        size = settings.vision.image_size
        pairs = ImagePairs(trained, settings.train.batch, settings.train.seed, size, problem)
        return Prepared(pairs, trained, held_out, None)
    features = once(trained, "training")
    pairs = FeaturePairs(features, settings.train.batch, settings.train.seed)
    return Prepared(pairs, features.records, held_out, features)


def whitening_for(
    settings: RunSettings, vision: Vision, records: Sequence[Record], run: Path, kept: Path, progress: Progress
) -> Whitening:
    """The run's whitening: the stage-1 run's if there is one to start from, else fitted to some training pictures."""
    if settings.start:
        found = read_whitening(Path(settings.start))
    else:
        sample = records[:: -(-len(records) // WHITENING_PICTURES)]
        raw, _ = encode_all(vision, sample, settings, kept / "whitening-sample.safetensors", "whitening", progress)
        found = fit_whitening(raw.values)
    save_whitening(found, run)
    return found


def encode_all(
    vision: Vision,
    records: Sequence[Record],
    settings: RunSettings,
    path: Path,
    name: str,
    progress: Progress,
) -> tuple[Features, list[str]]:
    """The frozen features of records, through the file at `path`; and one line for each bad picture."""
    made_by = f"{settings.vision.name} layer {settings.vision.layer} at {settings.vision.image_size} px"
    if vision.whitening is not None:
        made_by += f", whitened by {float(vision.whitening.matrix.double().square().sum()):.12g}"
    with progress.steps(f"features ({name})", -(-len(records) // 32)) as bar, torch.no_grad():
        return compute_features(
            records,
            lambda pixels: vision(pixels.to(device())),
            settings.vision.image_size,
            path,
            made_by,
            bar.advance,
        )


def start_from_stage1(model: Stage2, run: Path) -> None:
    """Puts a stage-1 run's query path over stage 2's, strictly; only the text path and the heads are left out."""
    weights = read_tensors(run / "model.safetensors")
    used = {
        name: value
        for name, value in weights.items()
        if not name.startswith(HEADS) and not any(part in name for part in TEXT_PATH)
    }
    wanted = {name: p for name, p in trained_parameters(model).items() if name.startswith("qformer.")}
    differing = sorted(used.keys() ^ wanted.keys()) or [n for n in used if used[n].shape != wanted[n].shape]
    if differing:
        raise UserError(
            f"start={run} does not fit this stage 2 (first: {differing[0]}): vision and qformer settings must be "
            "those of the stage-1 run"
        )
    for name, value in used.items():
        wanted[name].data.copy_(value)


def warm_start_from(model: Stage2, data: Prepared, settings: RunSettings, most: int = 4000) -> float:
    """`warm_start` on up to `most` training pictures, in eval mode."""
    model.eval()
    rows, captions = [], []
    with torch.no_grad(), autocast(model, settings.train.precision):
        for number in range(-(-min(most, len(data.records)) // settings.train.batch)):
            batch = data.batches(number)
            memory = model.qformer.look(see_batch(model, batch))
            rows.append(model.qformer(memory).queries.float().mean(1))
            captions += batch.captions
    r2 = warm_start(model, torch.cat(rows), captions)
    model.train()
    return r2


def name_long_captions(tokens: QFormerTokens, records: Sequence[Record], run: Path, progress: Progress) -> None:
    """Counts and names the captions that are cut at the token limit, as the paper cuts them."""
    owners = [(record, caption) for record in records for caption in record.captions]
    long = [owners[n] for n in tokens.too_long([caption for _, caption in owners])]
    if long:
        with (run / "skipped.jsonl").open("a", encoding="utf-8") as file:
            for record, caption in long:
                file.write(json.dumps({"cut": f"{record.id}: {caption}"}) + "\n")
        progress.say(
            f"{len(long)} captions have more than {tokens.longest} tokens and are cut there (data.max_tokens); the "
            f"first is of {long[0][0].id}; all are in {run / 'skipped.jsonl'}"
        )


def see_batch(model: Stage1 | Stage2, batch: PairBatch) -> Tensor:
    """The features of a batch, given or encoded now: `[B, P, V]`."""
    from openblip2.model.stage1 import see

    return see(model.vision, **seen(batch))


def seen(batch: PairBatch) -> dict[str, Any]:
    """The pictures of a batch as arguments of a model: images or features, on the device."""
    return {
        "images": None if batch.images is None else batch.images.to(device()),
        "features": None if batch.features is None else batch.features.to(device()),
    }


def write_config(run: Path, settings: RunSettings, qformer: nn.Module) -> None:
    """`config.json`: the resolved settings, the sizes read off the checkpoints, and the versions."""
    import transformers

    from openblip2 import __version__

    write_json(
        {
            "settings": to_dict(settings),
            "sizes": qformer.sizes,
            "versions": {
                "openblip2": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        },
        run / "config.json",
    )


def show_parts(model: nn.Module, progress: Progress) -> None:
    """Prints part, parameters, trained or frozen."""
    for name, count, state in parts_table(model):
        progress.say(f"{name:12} {count:>13,} {state}")


def _require_start(settings: RunSettings) -> None:
    if settings.stage == "stage1":
        raise UserError(f"start={settings.start}: stage 1 starts from qformer.start; only stage 2 starts from a run")
    if from_dict(read_config(Path(str(settings.start)))["settings"]).stage != "stage1":
        raise UserError(f"start={settings.start} is no stage-1 run; give the folder that `train stage1 --out` wrote")


def _require_same(settings: RunSettings, run: Path) -> None:
    last_checkpoint(run)
    before = from_dict(read_config(run)["settings"])
    if change(before, {}) != settings:
        raise UserError(
            f"--resume: {run / 'config.json'} was trained with other settings; give the same ones, or a new --out"
        )
