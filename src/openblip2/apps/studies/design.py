"""Definitions of the studies: the ways that each one compares, and the claims that its figures test.

A way is a set of changes to the settings of the plan; two ways of a study differ in nothing else. A new study needs one
function here and one line in `STUDIES`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from random import Random
from shutil import rmtree
from typing import Any

from openblip2.apps.studies.study import BOTH, GAP, LOSS, RIGHT, SCORES, Claim, Plan, Study, Way, digest_of
from openblip2.apps.studies.trials import DATA_SEED, Work, train_way
from openblip2.capfilt import capfilt
from openblip2.capfilt.shard import How
from openblip2.data.records import Record
from openblip2.data.web.tars import read_tar
from openblip2.data.web.write_shards import write_shards
from openblip2.errors import UserError

RECALLS = [BOTH.format(score) for score in SCORES.values()]
RECALL, RERANKED = RECALLS[:2]
SCENES = 1500  # number of training scenes, unless the study or --scenes gives another one
# The study of CapFilt: half of the training images are clean, and the other half, "the web", has noisy captions.
NOISE = 0.5  # fraction of the web's images that have another image's caption
SHARD = 250  # images per shard
FILTERS = {"capfilt": How(), "itm": How(captions=1, filter="itm")}


def study_of(name: str, plan: Plan) -> tuple[Study, Plan]:
    """The study of that name, and the plan with the study's defaults filled in.

    Raises:
        UserError: an unknown study, `values` that it does not use, or too few of them.
    """
    if name not in STUDIES:
        raise UserError(f"unknown study {name!r}: studies are {', '.join(STUDIES)}")
    make, usual = STUDIES[name]
    if plan.values and not usual:
        others = " and ".join(other for other, (_, values) in STUDIES.items() if values)
        raise UserError(f"--values: leave it out for {name}; only {others} use it")
    plan = replace(plan, values=tuple(sorted(set(plan.values or usual))))
    if usual and plan.values[0] < 1:
        raise UserError(f"--values {plan.values[0]}: give numbers of 1 or more")
    study = make(plan)
    needed = max((count for way in study.ways for count in way.pictures.values()), default=0)
    plan = replace(plan, scenes=plan.scenes or needed or SCENES)
    if needed > (plan.scenes or 0):
        raise UserError(f"--values {needed}: there are only {plan.scenes} training scenes; give more with --scenes")
    return study, plan


def _claims(
    says: str, source: str, *pairs: tuple[str, str], figures: Sequence[str] = (LOSS, RIGHT, RECALL)
) -> tuple[Claim, ...]:
    """One claim for each figure and each pair (better way, worse way); `says` may contain {} for the two names."""
    return tuple(Claim(says.format(*pair), source, figure, *pair) for pair in pairs for figure in figures)


def _stage1(plan: Plan) -> Study:
    off, on = {"warm_start": False}, {"warm_start": True}
    none, paper = "without stage 1", "with stage 1"
    second, both = "with stage 1, closed-form start of stage 2", "with stage 1, closed-form starts of both"
    helps, starts = "stage 2 is better with stage 1 than without", "a closed-form start of stage 1 helps both stages"
    return Study(
        "stage1",
        "what are stage 1 and the closed-form starts worth?",
        (Way(none, None, off), Way(paper, off, off), Way(second, off, on), Way(both, on, on)),
        (
            Claim(helps, "paper, figure 5", LOSS, paper, none),
            Claim(f"{helps}: it looks at the picture more", "paper, figure 5", GAP, paper, none),
            *_claims("stage 2 is better after a closed-form start", "ours", (second, paper), figures=(LOSS, RIGHT)),
            *_claims(starts, "ours", (both, second), figures=(LOSS, RIGHT, RECALL, RERANKED)),
        ),
        ("stage1", "stage2"),
        {"stage1": 60, "stage2": 32},
        (
            "The paper's figure 5 shows accuracy on VQAv2; here it is the loss of captions of unseen pictures.",
            "The first two ways do not use a closed-form start, as in the paper.",
        ),
        reranks=True,
    )


def _itg(plan: Plan) -> Study:
    without, all_three, says = "ITC + ITM", "ITC + ITM + ITG", "retrieval is better when ITG is trained too"
    return Study(
        "itg",
        "does writing captions (ITG) help retrieval?",
        (
            Way(without, {"stage1.objectives": ("itc", "itm")}),
            Way(all_three, {"stage1.objectives": ("itc", "itm", "itg")}),
        ),
        _claims(says, "paper, table 6", (all_three, without), figures=RECALLS),
        ("stage1",),
        {"stage1": 140},
        (
            "The paper's table 6 fine-tunes on COCO and re-ranks 128 candidates; here nothing is fine-tuned.",
            "Where ITM is still at chance level, re-ranking with it puts ITC's best candidates in random order.",
        ),
        reranks=True,
    )


def _queries(plan: Plan) -> Study:
    if len(plan.values) < 2:
        raise UserError("--values: give at least two numbers of queries")
    names = [f"{number} queries" for number in plan.values]
    ways = [{"qformer.queries": number} for number in plan.values]
    more_than = [(more, fewer) for fewer, more in pairwise(names)]
    return Study(
        "queries",
        "how many queries?",
        tuple(Way(name, way, way) for name, way in zip(names, ways, strict=True)),
        _claims("{} are better than {}", "no source: the paper uses 32 and tests no other number", *more_than),
        ("stage1", "stage2"),
        {"stage1": 48, "stage2": 18},
    )


def _encoder(plan: Plan) -> Study:
    strong, weak = "DINOv2-S/14", "EfficientNet-Lite0"
    return Study(
        "encoder",
        "does a stronger image encoder help?",
        (Way(weak, plan.weaker, plan.weaker), Way(strong, {}, {})),
        _claims("a stronger image encoder makes a better model", "paper, section 4.1 and table 2", (strong, weak)),
        ("stage1", "stage2"),
        {"stage1": 84, "stage2": 32},
        (
            "The two differ in more than strength: a vision transformer of 22 million parameters, trained without "
            "labels, read after layer 8 at 168 px (145 tokens of width 384), and a CNN of 3.4 million, trained on "
            "ImageNet's labels, at 224 px (49 tokens of width 1280).",
        ),
    )


def _connector(plan: Plan) -> Study:
    side, *more = plan.values
    if more:
        raise UserError("--values: give only one number, the side of the grid of visual tokens")
    queries = {"qformer.queries": side * side}

    def other(name: str, **options: int) -> dict[str, Any]:
        return {"warm_start": False, "connector.name": name, "connector.options": {"width": 384, **options}}

    trained, alone, resampler = "Q-Former after stage 1", "Q-Former without stage 1", "perceiver resampler"
    mlp, pooled, abstractor = "MLP on all patches", "MLP on pooled patches", "C-Abstractor"
    pairs = [(trained, rival) for rival in (alone, resampler, mlp, pooled, abstractor)]
    return Study(
        "connector",
        "which connector between image encoder and language model?",
        (
            Way(trained, queries, queries),
            Way(alone, None, {"warm_start": False, **queries}),
            Way(resampler, None, other("resampler", queries=side * side, heads=6)),
            Way(mlp, None, other("mlp")),
            Way(pooled, None, other("pooled_mlp", grid=side)),
            Way(abstractor, None, other("c_abstractor", grid=side)),
        ),
        (
            *_claims("a Q-Former after stage 1 is better", "paper", *pairs, figures=(LOSS, RIGHT)),
            Claim("pooling is better than a Q-Former", "DeCo (Yao et al., 2024)", RIGHT, pooled, alone),
            Claim("a resampler is better than stage 2 alone", "no source", RIGHT, resampler, alone),
            Claim("convolutions are better than queries", "Honeybee (Cha et al., 2024)", RIGHT, abstractor, resampler),
        ),
        ("stage2",),
        {"stage1": 140, "stage2": 60},
        (
            f"All have {side * side} visual tokens, except the MLP on all patches, which has one for each patch.",
            "Steps of stage 2 are equal. The Q-Former after stage 1 has the steps of stage 1 in addition.",
        ),
    )


def _capfilt(plan: Plan) -> Study:
    swapped, filtered, itm, right = "the web's captions", "CapFilt", "CapFilt, BLIP's form", "the right captions"
    says = "retrieval is better when the web's captions went through {} first"
    no_itm = {"stage1.objectives": ("itc", "itg")}  # retrieval is scored by ITC alone, and ITM takes half of the time
    return Study(
        "capfilt",
        "what is CapFilt worth?",
        (
            Way(swapped, no_itm, records=lambda work: web_half(work.train)),
            Way(filtered, no_itm, records=partial(filtered_half, name="capfilt")),
            Way(itm, no_itm, records=partial(filtered_half, name="itm")),
            Way(right, no_itm, records=lambda work: right_half(work.train)),
        ),
        (
            Claim(says.format("CapFilt"), "paper, section 3.4; BLIP, table 1", RECALL, filtered, swapped),
            Claim(says.format("an ITM filter"), "BLIP, table 1", RECALL, itm, swapped),
        ),
        ("stage1",),
        {"stage1": 140, "stage2": 60},
        (
            "Half of the pictures are clean: captioner (both stages) and ranker (stage 1) are trained on them, once. "
            "The ways are trained on the other half, the web, where every second caption is another picture's, "
            "by ITC and ITG. The seeds vary this training alone.",
            "The web's and the right captions are one for each picture; CapFilt keeps two of eleven, and BLIP's form "
            "up to two of two. A picture without any caption left is not trained on.",
            "The paper ranks with CLIP ViT-L/14, which is in no package: here our own stage 1 is used.",
        ),
    )


def right_half(records: Sequence[Record]) -> list[Record]:
    """The second half of the images, "the web", each with its own first caption."""
    return [replace(record, captions=record.captions[:1]) for record in records[len(records) // 2 :]]


def web_half(records: Sequence[Record]) -> list[Record]:
    """The same images, of which a fraction `NOISE` have exchanged their captions."""
    half = right_half(records)
    swapped = Random("0/swapped").sample(range(len(half)), round(NOISE * len(half)))
    captions = [half[n].captions for n in [*swapped[1:], *swapped[:1]]]
    for n, texts in zip(swapped, captions, strict=True):
        half[n] = replace(half[n], captions=texts)
    return half


def filtered_half(work: Work, name: str) -> list[Record]:
    """The web's images that still have captions after CapFilt, with these captions; the same for all seeds."""
    helper = Way("captioner", {}, {}, records=lambda work: work.train[: len(work.train) // 2])
    models, noisy, out = train_way(work, helper, DATA_SEED), web_half(work.train), work.runs.out
    how, shards, new, progress = FILTERS[name], out / "web", out / f"web-{name}", work.runs.progress

    def run() -> dict[str, Any]:
        """Runs the code of the command `capfilt`; returns the captions by image, and the counts."""
        for folder in (shards, new):
            rmtree(folder, ignore_errors=True)
        with progress.steps("shards", len(noisy)) as bar:
            write_shards(noisy, shards, SHARD, 0, lambda count: bar.advance(count=count))
        captioner, ranker = (str(models[stage].folder) for stage in ("stage2", "stage1"))
        written = capfilt(str(shards), captioner, ranker, new, how, progress)
        samples = (sample for path in sorted(new.glob("*.tar")) for sample in read_tar(str(path), progress.say))
        kept = {sample.about["image_id"]: list(sample.captions) for sample in samples}
        if not kept:
            raise UserError(f"{new}: CapFilt kept no picture: train captioner and ranker for longer (--stage1-steps)")
        return {"captions": kept, "counts": dict(written.counts)}

    of = {"captioner": models["stage2"].of, "how": asdict(how), "captions": digest_of(noisy)}
    kept = work.runs.cached(out / f"web-{name}.json", of, run)["captions"]
    return [replace(record, captions=tuple(kept[record.id])) for record in noisy if record.id in kept]


def _pictures(plan: Plan) -> Study:
    """Learning curve: both stages from scratch, with equal steps, on the first n pictures."""
    names = [f"{number:,} pictures" for number in plan.values]
    amounts = [{"stage1": number, "stage2": number} for number in plan.values]
    return Study(
        "pictures",
        "how many pictures are needed?",
        tuple(Way(name, {}, {}, amount) for name, amount in zip(names, amounts, strict=True)),
        _claims("{} are better than {}", "ours", *((more, fewer) for fewer, more in pairwise(names))),
        ("stage1", "stage2"),
        {"stage1": 140, "stage2": 60},
        ("Steps are equal, so fewer pictures are seen more often.",),
    )


def _elastic(plan: Plan) -> Study:
    """One stage-2 run with elastic tokens and one without, each used with its first n visual tokens."""
    queries = plan.stage2.qformer.queries
    if plan.values[-1] > queries:
        raise UserError(f"--values {plan.values[-1]}: give at most {queries} visual tokens (qformer.queries)")
    ways, claims = [], []
    for number in plan.values:
        one, both = f"always {queries}, first {number}", f"elastic, first {number}"
        adapt = partial(_use_first, number)
        ways += [Way(one, {}, {}, adapt=adapt), Way(both, {}, {"stage2.elastic_tokens": True}, adapt=adapt)]
        says, source = f"with the first {number} tokens elastic training is better", "Matryoshka Query Transformer"
        claims.append(Claim(says, f"{source} (Hu et al., 2024)", LOSS, both, one))
    return Study(
        "elastic",
        "what does elastic training gain and cost?",
        tuple(ways),
        tuple(claims),
        ("stage2",),
        {"stage1": 140, "stage2": 60},
    )


def _use_first(number: int, captioner: Any) -> None:
    captioner.model.first = number


# By name: the study, and the numbers that it compares unless `--values` gives others.
STUDIES: dict[str, tuple[Callable[[Plan], Study], tuple[int, ...]]] = {
    "stage1": (_stage1, ()),
    "itg": (_itg, ()),
    "queries": (_queries, (4, 16, 32)),
    "encoder": (_encoder, ()),
    "connector": (_connector, (4,)),
    "capfilt": (_capfilt, ()),
    "pictures": (_pictures, (250, 1000, 4000)),
    "elastic": (_elastic, (1, 4, 8, 16)),
}
