"""What a run's settings and log say of its health. Pure functions of plain values; nothing is loaded."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

from openblip2.config import RunSettings
from openblip2.evaluate.levels import (
    ITM_ACCURACY_CHANCE,
    ITM_CHANCE,
    itc_chance,
    smoothed_floor,
    word_chance,
)

Row = Mapping[str, Any]
Level = Literal["good", "note", "bad"]

EARLY = 0.1  # share of the steps before which a loss may still lie at chance
NEAR = 0.02  # of chance: a loss this near has learned nothing
ITM_NEAR = 0.06  # and of ITM's, which creeps below it by telling easy pairs and little else
FEW_QUERIES = 0.25  # of the queries: fewer are used, in effect
# Thresholds of the effective rank. Below 1.5, one direction holds at least 86 % of the squared size of what a picture's
# queries put out. In our trials stage 2 learned more than twice as fast at 2.3 as at 1.0 (16 queries).
COLLAPSED = 1.5
DISTINCT = 2.0  # two directions of equal size; with more than 8 queries FEW_QUERIES of them, as `queries_used`
FEWEST_JUDGED = 4  # queries: fewer can hardly be far above 1.5
SPREAD = (
    "stage 1 with stage1.decorrelation=1, because stage 2 cannot separate equal queries; or fewer queries, which then "
    "lose nothing"
)
MORE_SPREAD = "a larger stage1.decorrelation in stage 1, or fewer queries, which then lose nothing"
SPIKE = 10.0  # times the median norm of the gradient
MEMORISED = 1.0  # nats between training and held-out loss
LAST = 20  # steps whose mean is "now"


@dataclass(frozen=True)
class Finding:
    """One sentence of what is seen, and one of what to try. `about`: what of the run it is about."""

    about: str
    level: Level
    seen: str
    advice: str = ""

    def in_words(self) -> str:
        mark = {"good": "ok  ", "note": "note", "bad": "BAD "}[self.level]
        return f"{mark}  {self.about}: {self.seen}{f'. Try: {self.advice}' if self.advice else ''}"


def findings(settings: RunSettings, rows: Sequence[Row], vocabulary: int = 30523) -> list[Finding]:
    """Everything that a run's log tells, the losses first.

    Args:
        rows: of `log.jsonl`. vocabulary: words of the Q-Former's text path.
    """
    steps = [row for row in rows if "loss" in row]
    looks = [row["validation"] | {"step": row["step"]} for row in rows if "validation" in row]
    bad = [row for row in rows if "bad" in row]
    found: list[Finding] = []
    if settings.stage == "stage1":
        found += _stage1(settings, steps, looks, vocabulary)
    else:
        found += _stage2(steps, looks)
    if looks and "effective_rank" in looks[-1]:
        early = _share_done(settings, steps) < EARLY
        advice = MORE_SPREAD if settings.stage1.decorrelation else SPREAD
        found.append(rank_finding(looks[-1]["effective_rank"], settings.qformer.queries, early, advice))
    found += _memorises(steps, looks)
    found += _overfits(looks, "stage1" if settings.stage == "stage1" else "stage2")
    found += _gradients(settings, steps, bad)
    found += _settings(settings)
    return found


def rank_finding(rank: float, queries: int, early: bool = False, advice: str = SPREAD) -> Finding:
    """What an effective rank says of a model with so many queries. `early`: nothing is called bad yet."""
    about, seen = "effective rank", f"{rank:.2f} of {queries}"
    if math.isnan(rank):
        return Finding(about, "bad", "the outputs of the queries are not finite")
    if queries < FEWEST_JUDGED:
        return Finding(about, "good", seen)
    if rank >= max(DISTINCT, FEW_QUERIES * queries):
        return Finding(about, "good", f"{seen}: the queries of a picture hold different things")
    if rank >= COLLAPSED:
        return Finding(about, "note", f"{seen}: the queries of a picture hold much the same", advice)
    seen += f": the {queries} queries of a picture hold nearly one and the same vector"
    return Finding(about, "note" if early else "bad", seen, advice)


def _stage1(settings: RunSettings, steps: Sequence[Row], looks: Sequence[Row], vocabulary: int) -> Iterator[Finding]:
    own, batch = settings.stage1, settings.train.batch
    early = _share_done(settings, steps) < EARLY
    last = looks[-1] if looks else {}
    if own.contrast == "softmax" and (itc := _now(steps, "itc")) is not None:
        chance, floor = itc_chance(batch), smoothed_floor(own.label_smoothing, batch)
        recall = [last[name] for name in ("tr@1", "ir@1") if name in last]
        of = f"; recall@1 is {100 * fmean(recall):.0f} % among {last['n']} held-out pairs" if recall else ""
        yield _loss(
            "ITC",
            itc,
            chance,
            floor,
            early,
            "a higher optim.lr or warm_start=true; also check that the captions belong to their images",
            of,
        )
    matched = [row for row in steps if "itm" in row]
    if (itm := _now(matched, "itm")) is not None:
        few = len(matched) < EARLY * settings.train.steps
        hard = last.get("itm_accuracy")
        of = ""
        if hard is not None:
            blind = 100 * ITM_ACCURACY_CHANCE
            of = f"; accuracy on held-out pairs is {100 * hard:.0f} % with hard negatives (guessing: {blind:.0f} %)"
            if "itm_easy_accuracy" in last:
                of += f" and {100 * last['itm_easy_accuracy']:.0f} % with random negatives (guessing: 50 %)"
        yield _loss(
            "ITM",
            itm,
            ITM_CHANCE,
            0.0,
            few,
            "more train.steps, because ITM starts to learn after ITC; until it does, rank by ITC alone (--rerank 0)",
            of,
            ITM_NEAR,
        )
    if (itg := _now(steps, "itg")) is not None:
        floor = smoothed_floor(own.label_smoothing, vocabulary)
        yield _loss("ITG", itg, word_chance(vocabulary), floor, early, "a higher optim.lr or more train.steps")
    if "queries_used" in last:
        used, of = last["queries_used"], settings.qformer.queries
        share = f"held-out texts find their pictures by {used:.1f} of {of} queries, in effect"
        if used < FEW_QUERIES * of:
            yield Finding("queries", "note", share, "fewer queries (qformer.queries) would do, or train longer")
        else:
            yield Finding("queries", "good", share)


def _stage2(steps: Sequence[Row], looks: Sequence[Row]) -> Iterator[Finding]:
    if (lm := _now(steps, "lm")) is not None:
        yield Finding("caption loss", "good", f"{lm:.2f} nats a token now, {steps[0].get('lm', lm):.2f} at first")
    if looks and "loss_right" in looks[-1]:
        right, other = looks[-1]["loss_right"], looks[-1]["loss_shuffled"]
        gap = f"held-out captions cost {right:.2f} with the right picture and {other:.2f} with another"
        if other - right < NEAR * right:
            yield Finding(
                "grounding",
                "bad",
                f"{gap}: the model does NOT look at the picture",
                "a start from stage 1, warm_start=true, more steps, or more pictures",
            )
        else:
            yield Finding("grounding", "good", f"{gap}: it looks at the picture")


def _loss(
    name: str, now: float, chance: float, floor: float, early: bool, advice: str, more: str = "", near: float = NEAR
) -> Finding:
    if now < chance * (1 - near):
        return Finding(
            name, "good", f"{now:.3f}, better than guessing ({chance:.2f}); the minimum is {floor:.2f}{more}"
        )
    if now > chance * (1 + near):
        seen, advice = f"{now:.3f}, worse than guessing ({chance:.2f})", "a lower optim.lr, or optim.clip=1"
    else:
        seen = f"{now:.3f}, no better than guessing ({chance:.2f})"
    if early:
        return Finding(name, "note", f"{seen}, but training has just begun{more}")
    return Finding(name, "bad", f"{seen}: the model has not learned this{more}", advice)


def _memorises(steps: Sequence[Row], looks: Sequence[Row]) -> Iterator[Finding]:
    for name, held in (("itc", "itc"), ("itg", "itg"), ("lm", "loss_right")):
        now = _now(steps, name)
        if now is not None and looks and looks[-1].get(held, 0.0) > now + MEMORISED:
            yield Finding(
                f"{name}, seen and unseen",
                "note",
                f"{now:.2f} in training, {looks[-1][held]:.2f} on held-out pictures: it learns those by heart",
                "more pictures, data.augment=true, or fewer steps",
            )


def _overfits(looks: Sequence[Row], stage: str) -> Iterator[Finding]:
    names = ("itc", "itg") if stage == "stage1" else ("loss_right",)
    for name in names:
        seen = [(row["step"], row[name]) for row in looks if name in row]
        if len(seen) < 3:
            continue
        step, best = min(seen, key=lambda pair: pair[1])
        now = seen[-1][1]
        if now > 1.05 * best and step < seen[-2][0]:
            yield Finding(
                f"held-out {name}",
                "note",
                f"{now:.2f} now, {best:.2f} at step {step}: it has been rising since",
                f"fewer steps (train.steps={step}), more pictures, or data.augment=true",
            )


def _gradients(settings: RunSettings, steps: Sequence[Row], bad: Sequence[Row]) -> Iterator[Finding]:
    norms = [row["grad_norm"] for row in steps if "grad_norm" in row]
    if bad:
        first = ", ".join(bad[0]["bad"])
        yield Finding(
            "steps left out",
            "bad" if len(bad) > 3 else "note",
            f"{len(bad)}, the first at step {bad[0]['step']} ({first})",
            "train.precision=fp32, optim.clip=1, or a lower rate",
        )
    if len(norms) >= 5:
        usual, most = median(norms), max(norms)
        told = f"median {usual:.2f}, largest {most:.2f}"
        if most > SPIKE * usual and settings.optim.clip == 0:
            yield Finding("gradient norm", "note", told, "optim.clip=1")
        elif usual < 1e-6:
            yield Finding(
                "gradient norm", "bad", f"{told}: nothing reaches what trains", "look whether anything trains"
            )
        else:
            yield Finding("gradient norm", "good", told)


def _settings(settings: RunSettings) -> Iterator[Finding]:
    batch, optim, steps = settings.train.batch, settings.optim, settings.train.steps
    if settings.stage == "stage1" and batch < 16:
        yield Finding(
            "batch",
            "note",
            f"{batch} pairs: ITC has {batch - 1} negatives",
            "train.batch of 32 or more; train.chunk for memory",
        )
    if optim.warmup >= steps:
        yield Finding(
            "rate",
            "bad",
            f"{optim.warmup} steps of warm-up in a run of {steps}: optim.lr is never reached",
            f"optim.warmup={max(1, steps // 20)}",
        )
    if optim.lr > 3e-3:
        yield Finding("rate", "note", f"optim.lr={optim.lr:g} is far above the paper's 1e-4", "1e-4 to 1e-3")
    if optim.min_lr > optim.lr:
        yield Finding("rate", "bad", f"optim.min_lr={optim.min_lr:g} is above optim.lr={optim.lr:g}", "a tenth of it")


def _now(steps: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in steps[-LAST:] if name in row]
    return fmean(values) if values else None


def _share_done(settings: RunSettings, steps: Sequence[Row]) -> float:
    return steps[-1]["step"] / settings.train.steps if steps else 0.0
