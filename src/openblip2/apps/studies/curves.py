"""Two studies with a number on the x axis: how many pictures to train on, and how many visual tokens to use."""

from functools import partial
from itertools import pairwise

from openblip2.apps.studies.study import BOTH, LOSS, SCORES, Claim, Plan, Study, Way
from openblip2.errors import UserError
from openblip2.inference.captioner import Captioner
from openblip2.inference.matcher import Matcher


def pictures_study(plan: Plan) -> Study:
    """Learning curve: both stages from scratch, with equal steps, on the first n pictures."""
    names = [f"{number:,} pictures" for number in plan.values]
    amounts = [{"stage1": number, "stage2": number} for number in plan.values]
    return Study(
        "pictures",
        "how many pictures are needed?",
        tuple(Way(name, {}, {}, amount) for name, amount in zip(names, amounts, strict=True)),
        tuple(
            Claim(f"{more} are better than {fewer}", "ours", figure, more, fewer)
            for fewer, more in pairwise(names)
            for figure in (LOSS, BOTH.format(SCORES["itc"]))
        ),
        ("stage1", "stage2"),
        {"stage1": 140, "stage2": 60},
        ("Steps are equal, so fewer pictures are seen more often.",),
    )


def elastic_study(plan: Plan) -> Study:
    """One stage-2 run with elastic tokens and one without, each used with its first n visual tokens."""
    queries = plan.stage2.qformer.queries
    if plan.values[-1] > queries:
        raise UserError(f"--values {plan.values[-1]}: there are {queries} visual tokens (qformer.queries)")
    ways, claims = [], []
    for number in plan.values:
        one, both = f"always {queries}, first {number}", f"elastic, first {number}"
        adapt = partial(_use_first, number)
        ways += [
            Way(one, {}, {}, adapt=adapt),
            Way(both, {}, {"stage2.elastic_tokens": True}, adapt=adapt),
        ]
        says = f"with the first {number} tokens elastic training is better"
        claims.append(Claim(says, "Matryoshka Query Transformer (Hu et al., 2024)", LOSS, both, one))
    return Study(
        "elastic",
        "what does elastic training gain and cost?",
        tuple(ways),
        tuple(claims),
        ("stage2",),
        {"stage1": 140, "stage2": 60},
        ("Steps of stage 2 are equal.",),
    )


def _use_first(number: int, model: Captioner | Matcher) -> None:
    assert isinstance(model, Captioner)
    model.model.first = number
