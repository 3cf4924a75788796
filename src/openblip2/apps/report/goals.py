"""The goals of the demo, and whether a run has reached them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

WAYS = ("tr@1", "ir@1")  # finding a caption by its picture, and a picture by its caption


@dataclass(frozen=True)
class Goal:
    """One goal in words. `met` is None if it was not measured."""

    what: str
    wanted: str
    reached: str
    met: bool | None


def goals(metrics: Mapping[str, Any]) -> list[Goal]:
    """The goals for the pictures of a demo, and the values that it reached.

    Args:
        metrics: the contents of `metrics.json`.
    """
    world, retrieval, loss = metrics["world"], metrics["retrieval"], metrics["grounding"]
    right, other = loss["loss_right"], loss["loss_shuffled"]
    recall, what = min(retrieval["itc"][way] for way in WAYS), "recall@1 both ways, ITC alone"
    most_minutes, most_memory, share = {"small": (12, 4, 0.85), "full": (60, 8, 0.4)}[world]
    gains = [retrieval["itm"][way] - retrieval["itc"][way] for way in WAYS]
    reached = f"{100 * gains[0]:+.1f} and {100 * gains[1]:+.1f} points to ITC's"
    exact = metrics["caption"]["objects_and_attributes"]
    halves = ("below half of another picture's", f"{right:.2f} and {other:.2f}", right < other / 2)
    bad = sum(len(run["bad"]) for run in metrics["health"].values())
    minutes, memory = metrics["seconds"]["total"] / 60, metrics["peak_memory_gb"]
    time = (f"at most {most_minutes}", f"{minutes:.1f}", minutes <= most_minutes)
    return [
        _at_least("captions with every object and attribute right", exact, share),
        Goal("caption loss with the right picture", *halves),
        *(_small_world(metrics) if world == "small" else [*_full_world(metrics), _at_least(what, recall, 0.6)]),
        Goal("recall@1 re-ranked by ITM", "ITC's or better, both ways", reached, min(gains) >= 0),
        Goal("bad findings of the doctor, both runs", "0", str(bad), bad == 0),
        Goal("minutes for everything, on two idle cores", *time),
        Goal("memory", f"at most {most_memory}\u00a0GB", f"{memory:.1f}\u00a0GB", memory <= most_memory),
    ]


def percent(share: float | None) -> str:
    """0.4567 -> "45.7 %"; None -> "not measured"."""
    return "not measured" if share is None else f"{100 * share:.1f}\u00a0%"


def _small_world(metrics: Mapping[str, Any]) -> list[Goal]:
    asked, run = metrics["vqa"]["scenes"], metrics["health"]["stage1"]
    blind = max(guesser.get("yes/no", {"accuracy": 0})["accuracy"] for guesser in asked["baselines"].values())
    above_blind = "10 points above the better blind guesser" + (f"'s {percent(blind)}" if "yes/no" in asked else "")
    rank = f"effective rank of {run['queries']} queries after stage 1"
    return [
        _at_least("open questions, zero-shot", asked.get("open", {}).get("accuracy"), 0.6),
        _at_least("yes/no questions, zero-shot", asked.get("yes/no", {}).get("accuracy"), blind + 0.1, above_blind),
        _at_least(rank, run["effective_rank"], 4, "at least 4", "{:.1f}".format),
    ]


def _full_world(metrics: Mapping[str, Any]) -> list[Goal]:
    pointing, found = metrics["pointing"], []
    if "easy-vqa" in metrics["vqa"]:
        asked = metrics["vqa"]["easy-vqa"]
        mine, blind = (way.get("open", way)["accuracy"] for way in (asked, asked["baselines"]["question_only"]))
        wanted = f"above {percent(blind)} (question only)"
        found = [Goal("open questions of easy-vqa, zero-shot", wanted, percent(mine), mine > blind)]
    twice = f"twice the centre's {percent(pointing['centre'])}"
    return [*found, _at_least("points at what a text names", pointing["pointing"], 2 * pointing["centre"], twice)]


def _at_least(
    what: str, value: float | None, least: float, wanted: str = "", words: Callable[[float], str] = percent
) -> Goal:
    reached = "not measured" if value is None else words(value)
    return Goal(what, wanted or f"at least {words(least)}", reached, None if value is None else value >= least)
