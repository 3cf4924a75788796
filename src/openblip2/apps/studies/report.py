"""A study's result in words: a document that can be read alone."""

from collections.abc import Mapping
from typing import Any

from openblip2.apps.studies.design import is_share, sentence


def in_words(result: Mapping[str, Any]) -> str:
    """What `ablation.json` holds, as Markdown: what was run, verdicts, figures, what differed, what is not shown."""
    pictures, seeds = result["pictures"], result["seeds"]
    run = [
        f"{pictures['train']:,} drawn scenes to train on",
        f"{pictures['test']:,} to score on, whose nouns have never been seen in their colours",
        *(f"stage {stage[-1]} {count} steps of {batch}" for stage, (count, batch) in result["steps"].items()),
        *(f"{label} {' and '.join(f'`{name}`' for name in names)}" for label, names in result["models"].items()),
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
    ]
    ranges = "; behind the semicolon the range over seeds" if len(seeds) > 1 else ""
    trained = ", ".join(f"{name} {_minutes(way['seconds'])}" for name, way in result["ways"].items())
    one = "One seed: what another draw of the training would give is not in the intervals (`--seeds 0,1,2`)."
    lines = [
        f"# {sentence(result['question'])}",
        "",
        f"`openblip2 ablate {result['study']}`: {'; '.join(run)}.",
        f"Brackets: 95 % intervals, bootstrap over pictures{ranges}.",
        "",
        *map(_claim, result["claims"]),
        "",
        *_table(result["ways"]),
        "",
        *_differing(result["ways"]),
        "",
        *(f"- {note}" for note in (*result["notes"], *([one] if len(seeds) == 1 else []))),
        "",
        f"Training and scoring took {_minutes(result['seconds']['training and scoring'])}.",
        f"To train a way once: {trained}.",
    ]
    return "\n".join(lines) + "\n"


def _claim(claim: Mapping[str, Any]) -> str:
    figure, unit = claim["figure"], "points" if is_share(claim["figure"]) else "nats a token"
    value, low, high = (_number(figure, claim[key], "+") for key in ("difference", "low", "high"))
    seeds = ", ".join(_number(figure, seed, "+") for seed in claim["seeds"])
    return (
        f"- **{sentence(claim['verdict'])}.** Claim ({claim['source']}): {claim['says']}. {sentence(figure)}, "
        f"{claim['better']} less {claim['worse']}: {value} {unit} [{low}, {high}]"
        f"{f'; by seed {seeds}' if len(claim['seeds']) > 1 else ''}.{_sooner(claim)}"
    )


def _sooner(claim: Mapping[str, Any]) -> str:
    found = claim["sooner"]
    if found is None:
        return ""
    reached = f" In the curves {claim['worse']} ended at {found['level']:.2f}, step {found['at']}; {claim['better']}"
    if found["from"] is None:
        return f"{reached} did not come down to that to stay."
    first = ", the first look" if found["from"] == found["first_looked_at"] else ""
    return f"{reached} was no higher from step {found['from']} on{first}."


def _table(ways: Mapping[str, Any]) -> list[str]:
    """A row for each figure, a column for each way."""
    rows = [["", *ways]]
    for name in next(iter(ways.values()))["figures"]:
        label = f"{name}, {'%' if is_share(name) else 'nats a token'}"
        rows.append([label, *(_cell(name, way["figures"][name]) for way in ways.values())])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def _cell(name: str, figure: Mapping[str, Any]) -> str:
    score, low, high = (_number(name, figure[key]) for key in ("score", "low", "high"))
    seeds = [_number(name, pick(figure["seeds"])) for pick in (min, max)] if len(figure["seeds"]) > 1 else []
    return f"{score} [{low}, {high}{'; ' if seeds else ''}{' to '.join(seeds)}]"


def _number(figure: str, value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if is_share(figure) else f"{value:{sign}.2f}"


def _differing(ways: Mapping[str, Any]) -> list[str]:
    """What each way's settings have that not all have."""
    lines = ["What differs between the ways:", ""]
    for name, way in ways.items():
        parts = [f"stage {stage[-1]}: {_settings(values)}" for stage, values in way["differs"].items()]
        parts += [f"stage 2 on {way['pictures']:,} pictures"] if way["pictures"] else []
        lines.append(f"- {name}: {'; '.join(parts)}")
    return lines


def _settings(values: Mapping[str, Any] | None) -> str:
    if values is None:
        return "none"
    return ", ".join(f"`{name}={value}`" for name, value in values.items()) or "as the others"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
