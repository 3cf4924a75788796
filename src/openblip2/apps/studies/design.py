"""The studies as values: the ways that each one compares, and the claims that its figures test.

A way is a set of changes to the settings of the plan; two ways of a study differ in nothing else. A new study is one
function here and one line in `STUDIES`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from shutil import rmtree
from typing import Any

from openblip2.apps.studies import curves
from openblip2.apps.studies.frame import Work, digest_of, train_way
from openblip2.apps.studies.study import BOTH, GAP, LOSS, SCORES, Claim, Plan, Run, Study, Way
from openblip2.capfilt import capfilt
from openblip2.capfilt.models import Models
from openblip2.capfilt.shard import How
from openblip2.data.records import Record
from openblip2.data.web.tars import read_tar
from openblip2.data.web.write_shards import write_shards
from openblip2.errors import UserError

SCENES = 1500  # to train on, unless the study or --scenes says otherwise


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
        raise UserError(f"--values: {name} compares no numbers; {others} do")
    plan = replace(plan, values=tuple(sorted(set(plan.values or usual))))
    if usual and plan.values[0] < 1:
        raise UserError(f"--values {plan.values[0]}: give numbers of 1 or more")
    study = make(plan)
    needed = max((count for way in study.ways for count in way.pictures.values()), default=0)
    plan = replace(plan, scenes=plan.scenes or needed or SCENES)
    if needed > (plan.scenes or 0):
        raise UserError(f"--values {needed}: there are {plan.scenes} scenes to train on (--scenes)")
    return study, plan


def _stage1(plan: Plan) -> Study:
    off, on = {"warm_start": False}, {"warm_start": True}
    none, paper, ours = "without stage 1", "with stage 1", "with stage 1, closed-form starts"
    helps = "stage 2 is better with stage 1 than without"
    return Study(
        "stage1",
        "what is stage 1 worth to stage 2?",
        (Way(none, None, off), Way(paper, off, off), Way(ours, on, on)),
        (
            Claim(helps, "paper, figure 5", LOSS, paper, none),
            Claim(f"{helps}: it looks at the picture more", "paper, figure 5", GAP, paper, none),
            Claim("closed-form starts of both stages are better than random ones", "ours", LOSS, ours, paper),
        ),
        ("stage2",),
        {"stage1": 60, "stage2": 32},
        (
            "The paper's figure 5 shows accuracy on VQAv2; here it is the loss of captions of unseen pictures.",
            "The first two ways have no closed-form start anywhere, as the paper has none. The third has it in both "
            "stages; the study `warm-start` takes the projection's alone.",
        ),
    )


def _itg(plan: Plan) -> Study:
    without, all_three = "ITC + ITM", "ITC + ITM + ITG"
    says = "retrieval is better when ITG is trained too"
    return Study(
        "itg",
        "does writing captions (ITG) help retrieval?",
        (
            Way(without, {"stage1.objectives": ("itc", "itm")}),
            Way(all_three, {"stage1.objectives": ("itc", "itm", "itg")}),
        ),
        tuple(
            Claim(says, "paper, table 6", BOTH.format(SCORES[score]), all_three, without) for score in ("itc", "itm")
        ),
        ("stage1",),
        {"stage1": 140},
        (
            "The paper's table 6 fine-tunes on COCO and re-ranks 128 candidates; here nothing is fine-tuned.",
            "Where ITM has not left its chance level, re-ranking by it is a draw among ITC's best candidates.",
        ),
        reranks=True,
    )


def _queries(plan: Plan) -> Study:
    if len(plan.values) < 2:
        raise UserError("--values: queries takes two numbers of queries or more")
    names = [f"{number} queries" for number in plan.values]
    ways = [{"qformer.queries": number} for number in plan.values]
    return Study(
        "queries",
        "how many queries?",
        tuple(Way(name, way, way) for name, way in zip(names, ways, strict=True)),
        tuple(
            Claim(
                f"{more} are better than {fewer}", "nobody's: the paper has 32 and tries no other", figure, more, fewer
            )
            for fewer, more in pairwise(names)
            for figure in (LOSS, BOTH.format(SCORES["itc"]))
        ),
        ("stage1", "stage2"),
        {"stage1": 48, "stage2": 18},
    )


def _encoder(plan: Plan) -> Study:
    strong, weak = "DINOv2-S/14", "EfficientNet-Lite0"
    says = "a stronger image encoder makes a better model"
    return Study(
        "encoder",
        "does a stronger image encoder help?",
        (Way(weak, plan.weaker, plan.weaker), Way(strong, {}, {})),
        tuple(
            Claim(says, "paper, section 4.1 and table 2", figure, strong, weak)
            for figure in (LOSS, BOTH.format(SCORES["itc"]))
        ),
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
        raise UserError("--values: connector takes one number, the side of the grid of visual tokens")
    queries = {"qformer.queries": side * side}

    def other(name: str, **options: int) -> dict[str, Any]:
        return {"warm_start": False, "connector.name": name, "connector.options": {"width": 384, **options}}

    trained, alone, resampler = "Q-Former after stage 1", "Q-Former without stage 1", "perceiver resampler"
    mlp, pooled, abstractor = "MLP on all patches", "MLP on pooled patches", "C-Abstractor"
    rivals = (resampler, mlp, pooled, abstractor)
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
        tuple(Claim("the Q-Former is the better connector", "paper", LOSS, trained, rival) for rival in rivals),
        ("stage2",),
        {"stage1": 140, "stage2": 60},
        (
            f"All have {side * side} visual tokens, except the MLP on all patches, which has one for each patch.",
            "Steps of stage 2 are equal. The Q-Former after stage 1 has the steps of stage 1 in addition.",
        ),
    )


def _warm_start(plan: Plan) -> Study:
    ways, claims = [], []
    for number in plan.values:
        random, closed = f"random, {number:,} pictures", f"closed form, {number:,} pictures"
        ways += [
            Way(random, {}, {"warm_start": False}, {"stage2": number}),
            Way(closed, {}, {"warm_start": True}, {"stage2": number}),
        ]
        says = f"with {number:,} pictures the projection's closed-form start is better than a random one"
        claims.append(Claim(says, "ours", LOSS, closed, random))
    return Study(
        "warm-start",
        "what is the closed-form start of the projection worth?",
        tuple(ways),
        tuple(claims),
        ("stage2",),
        {"stage1": 60, "stage2": 16},
        (
            "All ways start from one stage-1 run on all pictures, whose own start is closed-form; only stage 2 is "
            "short of pictures.",
            "Swapping the language model under a finished stage 1 takes these same steps: the projection is solved "
            "for anew, from the new model's own word embeddings, and stage 2 goes on from there. Here that is done "
            "with one language model, the only one that packages carry: that a second or a larger one gains as much is "
            "not shown.",
        ),
    )


def _capfilt(plan: Plan) -> Study:
    swapped, filtered, itm, right = "the web's captions", "CapFilt", "CapFilt, BLIP's form", "the right captions"
    says = "retrieval is better when the web's captions went through {} first"
    figure = BOTH.format(SCORES["itc"])
    return Study(
        "capfilt",
        "what is CapFilt worth?",
        (
            Way(swapped, records=lambda work, seed: web_half(work.train)),
            Way(filtered, records=partial(_filtered, name="capfilt")),
            Way(itm, records=partial(_filtered, name="itm")),
            Way(right, records=lambda work, seed: right_half(work.train)),
        ),
        (
            Claim(says.format("CapFilt"), "paper, section 3.4; BLIP, table 1", figure, filtered, swapped),
            Claim(says.format("an ITM filter"), "BLIP, table 1", figure, itm, swapped),
        ),
        ("stage1",),
        {"stage1": 140, "stage2": 60},
        (
            "Half of the pictures are clean: captioner (both stages) and ranker (its stage 1) are trained on them, and "
            "no way is. The other half is the web: every second caption there is another picture's.",
            "The web's and the right captions are one for each picture; CapFilt keeps two of eleven, and BLIP's form "
            "up to two of two. A picture of which none is left is not trained on.",
            "The paper ranks by CLIP ViT-L/14, which packages do not carry: here it is our own stage 1.",
        ),
    )


NOISE = 0.5  # fraction of the web's images that have another image's caption
SHARD = 250  # images per shard
FILTERS = {"capfilt": How(), "itm": How(captions=1, filter="itm")}


def clean_half(records: Sequence[Record]) -> list[Record]:
    """The images that CapFilt's captioner and ranker are trained on."""
    return list(records[: len(records) // 2])


def right_half(records: Sequence[Record]) -> list[Record]:
    """The other images, the web's, each with its own first caption."""
    return [replace(record, captions=record.captions[:1]) for record in records[len(records) // 2 :]]


def web_half(records: Sequence[Record]) -> list[Record]:
    """The other images, of which a fraction `NOISE` have exchanged their captions."""
    half = right_half(records)
    swapped = Random("0/swapped").sample(range(len(half)), round(NOISE * len(half)))
    captions = [half[n].captions for n in [*swapped[1:], *swapped[:1]]]
    for n, texts in zip(swapped, captions, strict=True):
        half[n] = replace(half[n], captions=texts)
    return half


def _filtered(work: Work, seed: int, name: str) -> list[Record]:
    """The web's images that have captions left after CapFilt, with these."""
    helper = Way("captioner", {}, {}, records=lambda work, seed: clean_half(work.train))
    models, noisy, out = train_way(work, helper, seed), web_half(work.train), work.runs.out / f"seed-{seed}"
    of = {"captioner": models["stage2"].of, "how": asdict(FILTERS[name]), "captions": digest_of(noisy)}
    run = partial(_run_capfilt, work, noisy, out / f"web-{name}", models, FILTERS[name])
    kept = work.runs.cached(out / f"web-{name}.json", of, run)["captions"]
    return [replace(record, captions=tuple(kept[record.id])) for record in noisy if record.id in kept]


def _run_capfilt(
    work: Work, records: Sequence[Record], out: Path, models: Mapping[str, Run], how: How
) -> dict[str, Any]:
    """Captions after CapFilt by image, and its counts, by the same code as the command `capfilt`."""
    shards, progress = work.runs.out / "web", work.runs.progress
    for folder in (shards, out):
        rmtree(folder, ignore_errors=True)
    with progress.steps("shards", len(records)) as bar:
        write_shards(records, shards, SHARD, 0, lambda count: bar.advance(count=count))
    names = Models(str(models["stage2"].folder), str(models["stage1"].folder))
    written = capfilt(str(shards), names, out, how, progress)
    kept = {
        sample.about["image_id"]: list(sample.captions)
        for path in sorted(out.glob("*.tar"))
        for sample in read_tar(str(path), progress.say)
    }
    if not kept:
        raise UserError(f"{out}: CapFilt left no picture: train captioner and ranker for longer (--stage1-steps)")
    return {"captions": kept, "counts": dict(written.counts)}


# By name: the study, and the numbers that it compares unless `--values` gives others.
STUDIES: dict[str, tuple[Callable[[Plan], Study], tuple[int, ...]]] = {
    "stage1": (_stage1, ()),
    "itg": (_itg, ()),
    "queries": (_queries, (4, 16, 32)),
    "encoder": (_encoder, ()),
    "connector": (_connector, (4,)),
    "warm-start": (_warm_start, (250, 1000, 4000)),
    "capfilt": (_capfilt, ()),
    "pictures": (curves.pictures_study, (250, 1000, 4000)),
    "elastic": (curves.elastic_study, (1, 4, 8, 16)),
}
