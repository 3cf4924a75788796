"""The first part of the report: what was trained, what it reached, and which goals it missed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from openblip2.data.scenes.vocabulary import WORLDS
from openblip2.report.markup import bar, duration, percent, table

STAMPS = "Tux Paint's stamps: small pictures, each with a sentence that people wrote"


@dataclass(frozen=True)
class Goal:
    """One of the figures the project wants its demo to reach. `met` is None where it was not measured."""

    what: str
    wanted: str
    reached: str
    met: bool | None


def goals(metrics: Mapping[str, Any]) -> list[Goal]:
    """What the project wants of its demo on these pictures, and what this run reached."""
    world = metrics.get("world")
    own, at_most, room = {
        "small": (_small_goals, 12, 4),
        "full": (_full_goals, 60, 8),
        None: (_stamps_goals, 20, 8),
    }[world]
    minutes, memory = metrics["seconds"]["total"] / 60, metrics["peak_memory_gb"]
    return [
        *own(metrics),
        _health_goal(metrics["health"]),
        Goal("minutes for everything, on two idle cores", f"at most {at_most}", f"{minutes:.1f}", minutes <= at_most),
        Goal("memory", f"at most {room}\u00a0GB", f"{memory:.1f}\u00a0GB", memory <= room),
    ]


def opening(metrics: Mapping[str, Any], stage1_log: Path, stage2_log: Path) -> str:
    """The heading, two paragraphs in plain words, and a card for each headline figure."""
    first, second = _settings(stage1_log), _settings(stage2_log)
    vision, language, start = (
        f"<code>{escape(name)}</code>"
        for name in (first["vision"]["name"], second["language"]["name"], first["qformer"]["start"])
    )
    pictures, every = metrics["pictures"], goals(metrics)
    missed = sum(goal.met is False for goal in every)
    told = f"Goals missed: {missed} of {len(every)}"
    steps = [f"{s['train']['steps']:,} steps of {s['train']['batch']}" for s in (first, second)]
    return (
        "<header><h1>A frozen language model describes pictures</h1>"
        f"<p>An image encoder ({vision}) and a language model ({language}), both frozen, were joined by a "
        f"Q-Former (started from {start}, {first['qformer']['queries']} queries). It was trained on "
        f"{pictures['train']:,} pictures with captions, {escape(_pictures_in_words(metrics))}: stage 1 for "
        f"{steps[0]}, stage 2 for {steps[1]}. All of it, scoring included, took "
        f"{duration(metrics['seconds']['total'])}.</p>"
        f"<p>Every figure below is about pictures that neither stage has seen ({pictures['test']:,} held "
        'out), and stands beside what chance or a blind guess reaches. <a href="#goals">'
        f"{told}</a>.</p></header>"
        f'<ul class="cards">{"".join(_cards(metrics))}</ul>'
        '<p class="soft small">In the bars, the upright mark is chance or the blind guess.</p>'
    )


def goals_table(metrics: Mapping[str, Any]) -> str:
    """The goals, reached and missed."""
    words = {True: ("good", "✓ reached"), False: ("bad", "✗ missed"), None: ("", "not measured")}
    rows = [
        [
            escape(goal.what),
            escape(goal.wanted),
            escape(goal.reached),
            '<span class="tag {}">{}</span>'.format(*words[goal.met]),
        ]
        for goal in goals(metrics)
    ]
    told = "<p>What this project wants its demo to reach, and what this run did.</p>"
    return told + table(["", "wanted", "this run", ""], rows)


def open_accuracy(found: Mapping[str, Any]) -> float:
    """Accuracy on open questions alone; on all where none is open."""
    return found.get("open", found)["accuracy"]


def _pictures_in_words(metrics: Mapping[str, Any]) -> str:
    if metrics["corpus"] == "stamps":
        return STAMPS
    count = len(WORLDS[metrics["world"]])
    return f"scenes drawn by openblip2: {count} things as coloured icons and shapes on light paper"


def _settings(log: Path) -> dict[str, Any]:
    return json.loads(log.with_name("config.json").read_text(encoding="utf-8"))["settings"]


def _stamps_goals(metrics: Mapping[str, Any]) -> list[Goal]:
    found, ground = metrics["retrieval"], metrics["grounding"]
    times = min(found["itc"]["tr@1"], found["itc"]["ir@1"]) / found["chance"]
    gap = ground["loss_shuffled"] - ground["loss_right"]
    return [
        Goal("recall@1 both ways, ITC alone", "15 times chance", f"{times:.1f} times chance", times >= 15),
        Goal("caption loss with another picture", "0.5 nats higher", f"{gap:+.2f} nats", gap >= 0.5),
    ]


def _small_goals(metrics: Mapping[str, Any]) -> list[Goal]:
    asked = metrics["vqa"]["scenes"]
    ranks = metrics["health"]["stage1"]
    return [
        *_caption_goals(metrics, 0.85),
        _share_goal("open questions, zero-shot", asked["open"]["accuracy"] if "open" in asked else None, 0.6),
        _yes_no_goal(asked),
        _reranking_goal(metrics["retrieval"]),
        _rank_goal(ranks["effective_rank"], ranks["queries"]),
    ]


def _full_goals(metrics: Mapping[str, Any]) -> list[Goal]:
    itc = metrics["retrieval"]["itc"]
    return [
        *_caption_goals(metrics, 0.4),
        *[_blind_goal(name, metrics["vqa"][name]) for name in ("easy-vqa",) if name in metrics["vqa"]],
        _share_goal("recall@1 both ways, ITC alone", min(itc["tr@1"], itc["ir@1"]), 0.6),
        _reranking_goal(metrics["retrieval"]),
        _pointing_goal(metrics["pointing"]),
    ]


def _share_goal(what: str, share: float | None, wanted: float) -> Goal:
    return Goal(what, f"at least {percent(wanted)}", percent(share), None if share is None else share >= wanted)


def _caption_goals(metrics: Mapping[str, Any], wanted: float) -> list[Goal]:
    right, other = metrics["grounding"]["loss_right"], metrics["grounding"]["loss_shuffled"]
    return [
        _share_goal(
            "captions with every object and attribute right", metrics["caption"]["objects_and_attributes"], wanted
        ),
        Goal(
            "caption loss with the right picture",
            "below half of another picture's",
            f"{right:.2f} and {other:.2f}",
            right < other / 2,
        ),
    ]


def _yes_no_goal(found: Mapping[str, Any]) -> Goal:
    what = "yes/no questions, zero-shot"
    if "yes/no" not in found:
        return Goal(what, "10 points above the better blind guesser", "not measured", None)
    blind = max(guesser["yes/no"]["accuracy"] for guesser in found["baselines"].values())
    mine = found["yes/no"]["accuracy"]
    wanted = f"10 points above the better blind guesser's {percent(blind)}"
    return Goal(what, wanted, percent(mine), mine >= blind + 0.1)


def _reranking_goal(found: Mapping[str, Any]) -> Goal:
    gains = [found["itm"][way] - found["itc"][way] for way in ("tr@1", "ir@1")]
    reached = " and ".join(f"{100 * gain:+.1f}" for gain in gains)
    return Goal(
        "recall@1 re-ranked by ITM", "ITC's or better, both ways", f"{reached} points to ITC's", min(gains) >= 0
    )


def _rank_goal(rank: float | None, queries: int) -> Goal:
    what = f"effective rank of {queries} queries after stage 1"
    if rank is None:
        return Goal(what, "at least 4", "not measured", None)
    return Goal(what, "at least 4", f"{rank:.1f}", rank >= 4)


def _health_goal(found: Mapping[str, Any]) -> Goal:
    count = sum(len(run["bad"]) for run in found.values())
    return Goal("findings of the doctor that are bad, both runs", "0", str(count), count == 0)


def _pointing_goal(found: Mapping[str, Any]) -> Goal:
    mine, centre = found["pointing"], found["centre"]
    return Goal(
        "points at what a text names", f"twice the centre's {percent(centre)}", percent(mine), mine >= 2 * centre
    )


def _blind_goal(name: str, found: Mapping[str, Any]) -> Goal:
    mine, blind = open_accuracy(found), open_accuracy(found["baselines"]["question_only"])
    wanted = f"above {percent(blind)} (question only)"
    return Goal(f"open questions of {name}, zero-shot", wanted, percent(mine), mine > blind)


def _cards(metrics: Mapping[str, Any]) -> list[str]:
    found = metrics["retrieval"]
    ways = {"tr@1": "The right caption for a picture", "ir@1": "The right picture for a caption"}
    return [
        _caption_card(metrics["caption"]),
        _grounding_card(metrics["grounding"]),
        *[_answers_card(name, scores) for name, scores in metrics["vqa"].items()],
        *[_retrieval_card(f"{what}, out of {found['n']}", found, key) for key, what in ways.items()],
    ]


def _retrieval_card(what: str, found: Mapping[str, Any], key: str) -> str:
    alone, after, chance = found["itc"][key], found["itm"][key], found["chance"]
    than = f"at first place by ITC alone; re-ranked by ITM {percent(after)}; chance {percent(chance)}"
    return _card(what, percent(alone), than, (alone, chance))


def _caption_card(found: Mapping[str, Any]) -> str:
    if found["objects_and_attributes"] is None:
        name, what = "exact", "Captions word for word as people wrote them"
    else:
        name, what = "objects_and_attributes", "Captions with every object and attribute right"
    chance = found["chance"][name]
    than = f"of {found['n']}; the same captions held to another picture {percent(chance)}"
    return _card(what, percent(found[name]), than, (found[name], chance))


def _answers_card(name: str, found: Mapping[str, Any]) -> str:
    mine = open_accuracy(found)
    blind, usual = (open_accuracy(found["baselines"][kind]) for kind in ("question_only", "majority"))
    than = (
        f"{'zero-shot: never trained on a question; ' if found['zero_shot'] else ''}by the question alone "
        f"{percent(blind)}, always the commonest answer {percent(usual)}"
    )
    return _card(f"Open questions answered, {escape(name)}", percent(mine), than, (mine, blind))


def _grounding_card(found: Mapping[str, Any]) -> str:
    other = f"with another picture {found['loss_shuffled']:.2f}"
    than = f"nats a token; {other}: the further apart, the more it looks"
    return _card("Caption loss with the right picture", f"{found['loss_right']:.2f}", than)


def _card(what: str, figure: str, than: str, shares: tuple[float, float] | None = None) -> str:
    drawn = bar(*shares) if shares else ""
    return f'<li><p class="what">{what}</p><p class="big">{figure}</p>{drawn}<p class="than">{than}</p></li>'
