"""Diagnoses a training run by its settings and its log. Pure functions of plain values; nothing is loaded."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

from openblip2.config import RunSettings

Row = Mapping[str, Any]

# Chance levels of the losses, in nats. ITC: log(batch). ITG: log(vocabulary). ITM: one pair in three is a match, and
# the accuracy at chance is that of the constant answer "no match".
ITM_CHANCE = math.log(3) - 2 / 3 * math.log(2)  # 0.6365
ITM_ACCURACY_CHANCE = 2 / 3

EARLY = 0.1  # fraction of the steps; until then, a loss may still be at chance
NEAR = 0.02  # fraction of the chance level: if the loss is nearer to it, nothing has been learned
ITM_NEAR = 0.06  # for ITM, whose loss falls slightly below chance when only easy pairs are separated
FEW_QUERIES = 0.25  # minimum fraction of the queries that should be used
# Thresholds of the effective rank. Below 1.5, one direction has at least 86 % of the squared norm of the query outputs
# of an image. In our trials, stage 2 learned more than twice as fast at 2.3 as at 1.0 (16 queries).
COLLAPSED = 1.5
DISTINCT = 2.0  # two directions of equal size; with more than 8 queries, FEW_QUERIES of them, as for `queries_used`
FEWEST_JUDGED = 4  # with fewer queries, the rank can hardly be far above 1.5
SPREAD = (
    "stage 1 with stage1.decorrelation=0.7, because stage 2 cannot separate equal queries; or fewer queries, which "
    "would be as good"
)
MORE_SPREAD = "a larger stage1.decorrelation in stage 1, or fewer queries, which would be as good"
FEWER = "or fewer queries (qformer.queries)"
ALL_QUERIES = f"stage1.smooth_maximum=0.03, so that ITC has a gradient for all queries; {FEWER}"
MORE_QUERIES = f"a larger stage1.smooth_maximum, so that more of the gradient of ITC goes to other queries; {FEWER}"
AUGMENT = "data.augment=true (pictures whose texts say left or right are not mirrored)"
SPIKE = 10.0  # times the median norm of the gradient
MEMORISED = 1.0  # nats by which the held-out loss exceeds the training loss
LAST = 20  # the current value is the mean over this many steps


@dataclass(frozen=True)
class Finding:
    """An observation: the part of the run, how serious it is, what was seen, and what to try."""

    about: str
    level: Literal["good", "note", "bad"]
    seen: str
    advice: str = ""

    def in_words(self) -> str:
        mark = {"good": "ok  ", "note": "note", "bad": "BAD "}[self.level]
        return f"{mark}  {self.about}: {self.seen}{f'. Try: {self.advice}' if self.advice else ''}"


def findings(settings: RunSettings, rows: Sequence[Row], vocabulary: int = 30523) -> list[Finding]:
    """All findings about a run, the losses first.

    Args:
        rows: the rows of `log.jsonl`.
        vocabulary: size of the Q-Former's vocabulary.
    """
    steps = [row for row in rows if "loss" in row]
    looks = [row["validation"] | {"step": row["step"]} for row in rows if "validation" in row]
    early = not steps or steps[-1]["step"] < EARLY * settings.train.steps
    if settings.stage == "stage1":
        found = [*_stage1(settings, steps, looks[-1] if looks else {}, vocabulary, early)]
    else:
        found = [*_stage2(steps, looks[-1] if looks else {})]
    # The settings do not contain the number of visual tokens of other connectors.
    if looks and "effective_rank" in looks[-1] and settings.connector.name == "qformer":
        advice = MORE_SPREAD if settings.stage1.decorrelation else SPREAD
        found.append(rank_finding(looks[-1]["effective_rank"], settings.qformer.queries, early, advice))
    found += _overfitting(settings, steps, looks)
    found += _gradients(settings, steps, [row for row in rows if "bad" in row])
    found += _settings(settings)
    return found


def rank_finding(rank: float, queries: int, early: bool = False, advice: str = SPREAD) -> Finding:
    """Judges the effective rank of a model with this number of queries. If `early`, a low rank is only a note."""
    about, seen = "effective rank", f"{rank:.2f} of {queries}"
    if math.isnan(rank):
        return Finding(about, "bad", "the outputs of the queries are not finite")
    if queries < FEWEST_JUDGED:
        return Finding(about, "good", seen)
    if rank >= max(DISTINCT, FEW_QUERIES * queries):
        return Finding(about, "good", f"{seen}: the queries of a picture contain different information")
    if rank >= COLLAPSED:
        return Finding(about, "note", f"{seen}: the queries of a picture contain similar information", advice)
    seen += f": the {queries} queries of a picture are almost the same vector"
    return Finding(about, "note" if early else "bad", seen, advice)


def smoothed_floor(smoothing: float, choices: int) -> float:
    """The lowest loss with label smoothing, in nats: the entropy of the smoothed target.

    The right one of `choices` gets 1 - smoothing, and in addition `smoothing` is divided evenly among all of them.
    """
    if smoothing == 0 or choices < 2:
        return 0.0
    rest = smoothing / choices
    right = 1 - smoothing + rest
    return -right * math.log(right) - (choices - 1) * rest * math.log(rest)


def _stage1(settings: RunSettings, steps: Sequence[Row], last: Row, vocabulary: int, early: bool) -> Iterator[Finding]:
    own, batch = settings.stage1, settings.train.batch
    if (itc := _now(steps, "itc")) is not None:
        recall = [last[name] for name in ("tr@1", "ir@1") if name in last]
        more = f"; recall@1 is {100 * fmean(recall):.0f} % among {last['n']} held-out pairs" if recall else ""
        advice = "a higher optim.lr or warm_start=true; also check that the captions belong to their images"
        yield _loss("ITC", itc, math.log(batch), smoothed_floor(own.label_smoothing, batch), early, advice, more)
    matched = [row for row in steps if "itm" in row]
    if (itm := _now(matched, "itm")) is not None:
        few, more = len(matched) < EARLY * settings.train.steps, ""
        if (hard := last.get("itm_accuracy")) is not None:
            blind = 100 * ITM_ACCURACY_CHANCE
            more = f"; accuracy on held-out pairs is {100 * hard:.0f} % with hard negatives (guessing: {blind:.0f} %)"
            if "itm_easy_accuracy" in last:
                more += f" and {100 * last['itm_easy_accuracy']:.0f} % with random negatives (guessing: 50 %)"
        advice = (
            "more train.steps, because ITM starts to learn after ITC; until it does, rank by ITC alone (--rerank 0)"
        )
        yield _loss("ITM", itm, ITM_CHANCE, 0.0, few, advice, more, ITM_NEAR)
    if (itg := _now(steps, "itg")) is not None:
        floor = smoothed_floor(own.label_smoothing, vocabulary)
        yield _loss("ITG", itg, math.log(vocabulary), floor, early, "a higher optim.lr or more train.steps")
    if "queries_used" in last:
        used, count = last["queries_used"], settings.qformer.queries
        seen = f"the best matches of held-out texts use {used:.1f} of {count} queries (effective number)"
        if used < FEW_QUERIES * count:
            yield Finding("queries", "note", seen, MORE_QUERIES if own.smooth_maximum else ALL_QUERIES)
        else:
            yield Finding("queries", "good", seen)


def _stage2(steps: Sequence[Row], last: Row) -> Iterator[Finding]:
    if (lm := _now(steps, "lm")) is not None:
        first = next(row["lm"] for row in steps if "lm" in row)  # with stage2.lm_start_step, this is not the first step
        yield Finding("caption loss", "good", f"{lm:.2f} nats per token now, {first:.2f} at the start")
    if "loss_right" in last:
        right, other = last["loss_right"], last["loss_shuffled"]
        gap = f"the loss of held-out captions is {right:.2f} with the right picture and {other:.2f} with another"
        if other - right < NEAR * right:
            advice = "a start from stage 1, a stage2.lm_start_step, more steps, or more pictures"
            yield Finding("grounding", "bad", f"{gap}: the model does NOT look at the picture", advice)
        else:
            yield Finding("grounding", "good", f"{gap}: it looks at the picture")


def _loss(
    name: str, now: float, chance: float, floor: float, early: bool, advice: str, more: str = "", near: float = NEAR
) -> Finding:
    if now < chance * (1 - near):
        seen = f"{now:.3f}, better than guessing ({chance:.2f}); the minimum is {floor:.2f}{more}"
        return Finding(name, "good", seen)
    if now > chance * (1 + near):
        seen, advice = f"{now:.3f}, worse than guessing ({chance:.2f})", "a lower optim.lr, or optim.clip=1"
    else:
        seen = f"{now:.3f}, no better than guessing ({chance:.2f})"
    if early:
        return Finding(name, "note", f"{seen}, but training has just begun{more}")
    return Finding(name, "bad", f"{seen}: the model has not learned this{more}", advice)


def _overfitting(settings: RunSettings, steps: Sequence[Row], looks: Sequence[Row]) -> Iterator[Finding]:
    for name, held_out in (("itc", "itc"), ("itg", "itg"), ("lm", "loss_right")):
        now = _now(steps, name)
        if now is not None and looks and looks[-1].get(held_out, 0.0) > now + MEMORISED:
            seen = f"{now:.2f} in training, {looks[-1][held_out]:.2f} on held-out pictures: it memorises training data"
            advice = f"more pictures, {AUGMENT}, or fewer steps"
            yield Finding(f"{name}, training and held-out", "note", seen, advice)
    for name in ("itc", "itg") if settings.stage == "stage1" else ("loss_right",):
        values = [(row["step"], row[name]) for row in looks if name in row]
        if len(values) < 3:
            continue
        step, best = min(values, key=lambda pair: pair[1])
        now = values[-1][1]
        if now > 1.05 * best and step < values[-2][0]:
            seen = f"{now:.2f} now, {best:.2f} at step {step}: it has been rising since"
            advice = f"fewer steps (train.steps={step}), more pictures, or {AUGMENT}"
            yield Finding(f"held-out {name}", "note", seen, advice)


def _gradients(settings: RunSettings, steps: Sequence[Row], bad: Sequence[Row]) -> Iterator[Finding]:
    if bad:
        seen = f"{len(bad)}, the first at step {bad[0]['step']} ({', '.join(bad[0]['bad'])})"
        advice = "train.precision=fp32, optim.clip=1, or a lower optim.lr"
        yield Finding("steps left out", "bad" if len(bad) > 3 else "note", seen, advice)
    norms = [row["grad_norm"] for row in steps if "grad_norm" in row]
    if len(norms) < 5:
        return
    usual, most = median(norms), max(norms)
    seen = f"median {usual:.2f}, largest {most:.2f}"
    if most > SPIKE * usual and settings.optim.clip == 0:
        yield Finding("gradient norm", "note", seen, "optim.clip=1")
    elif usual < 1e-6:
        seen += ": no gradient reaches the trained parts"
        yield Finding("gradient norm", "bad", seen, "checking which parts are trained")
    else:
        yield Finding("gradient norm", "good", seen)


def _settings(settings: RunSettings) -> Iterator[Finding]:
    batch, optim, steps = settings.train.batch, settings.optim, settings.train.steps
    if settings.stage == "stage1" and batch < 16:
        advice = "train.batch of 32 or more; train.chunk reduces memory"
        yield Finding("batch", "note", f"{batch} pairs: ITC has {batch - 1} negatives", advice)
    own = settings.stage1
    if settings.stage == "stage1" and "itm" in own.objectives and own.itm_start_step >= steps:
        seen = f"it starts after step {own.itm_start_step} of a run of {steps}: it is never trained"
        yield Finding("ITM", "bad", seen, "stage1.itm_start_step=0, or more train.steps")
    if optim.warmup >= steps:
        seen = f"{optim.warmup} steps of warm-up in a run of {steps}: optim.lr is never reached"
        yield Finding("rate", "bad", seen, f"optim.warmup={max(1, steps // 20)}")
    if optim.lr > 3e-3:
        yield Finding("rate", "note", f"optim.lr={optim.lr:g} is far above the paper's 1e-4", "1e-4 to 1e-3")
    if optim.min_lr > optim.lr:
        yield Finding("rate", "bad", f"optim.min_lr={optim.min_lr:g} is above optim.lr={optim.lr:g}", "optim.lr / 10")


def _now(steps: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in steps[-LAST:] if name in row]
    return fmean(values) if values else None
