"""The studies as values: the ways that each one compares, and the claims that its figures test.

A way is a set of changes to the settings of the plan; two ways of a study differ in nothing else.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

from openblip2.apps.studies.study import BOTH, GAP, LOSS, SCORES, Claim, Plan, Study, Way
from openblip2.errors import UserError


def study_of(name: str, plan: Plan) -> tuple[Study, Plan]:
    """The study of that name, and the plan with the study's defaults filled in.

    Raises:
        UserError: an unknown study, `values` that it does not use, or too few of them.
    """
    if name not in STUDIES:
        raise UserError(f"unknown study {name!r}: studies are {', '.join(STUDIES)}")
    usual = {"queries": (4, 16, 32), "warm-start": (250, 1000, 4000), "connector": (4,)}
    if plan.values and name not in usual:
        raise UserError(f"--values: {name} compares no numbers; {' and '.join(usual)} do")
    values = tuple(sorted(set(plan.values or usual.get(name, ()))))
    if name == "connector" and len(values) > 1:
        raise UserError("--values: connector takes one number, the side of the grid of visual tokens")
    if plan.values and (len(values) < (2 if name == "queries" else 1) or min(values) < 1):
        raise UserError(
            f"--values {','.join(map(str, plan.values))}: give numbers of 1 or more, for queries two at least"
        )
    scenes = plan.scenes or (max(values) if name == "warm-start" else 1500)
    if name == "warm-start" and max(values) > scenes:
        raise UserError(f"--values {max(values)}: there are {scenes} scenes to train on (--scenes)")
    plan = replace(plan, scenes=scenes, values=values)
    return STUDIES[name](plan), plan


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
    (side,) = plan.values
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
            Way(random, {}, {"warm_start": False}, number),
            Way(closed, {}, {"warm_start": True}, number),
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
            f"All ways start from one stage-1 run on {plan.scenes:,} pictures, whose own start is closed-form; only "
            "stage 2 is short of pictures.",
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
            Way(swapped, web="swapped"),
            Way(filtered, web="capfilt"),
            Way(itm, web="itm"),
            Way(right, web="right"),
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
        helper=Way("captioner", {}, {}),
    )


STUDIES = {
    "stage1": _stage1,
    "itg": _itg,
    "queries": _queries,
    "encoder": _encoder,
    "connector": _connector,
    "warm-start": _warm_start,
    "capfilt": _capfilt,
}
