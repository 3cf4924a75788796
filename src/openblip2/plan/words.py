"""A plan in words and as plain values."""

from typing import Any

from openblip2.plan.gpus import GIB
from openblip2.plan.paper import DAYS, GPUS_OF_IT, PUBLISHED, TEXT, WHOSE, implied_efficiency, paper_flops
from openblip2.plan.plan import DAY, Plan
from openblip2.presets import preset

WIDTH = 44  # of the names


def in_words(plan: Plan, name: str) -> list[str]:
    """The lines of a plan; `name`: of its preset."""
    cluster, train = plan.cluster, plan.settings.train
    machines = f" in {cluster.machines} machines" if cluster.machines > 1 else ""
    many = f"{cluster.count} x {cluster.kind.name}{machines}"
    lines = [
        f"{name} on {many}, {train.parallel}: {train.steps:,} steps of {plan.step_pairs:,} pairs, "
        f"{plan.pairs:,} at a time on each",
        "",
        *_memory(plan),
        "",
        *_work(plan),
        "",
        *_time(plan),
    ]
    if plan.flows:
        lines += ["", *_network(plan)]
    lines += ["", "assumptions that matter", *(f"- {line}" for line in assumptions(plan))]
    if paper := against_paper(plan, name):
        lines += ["", paper]
    return lines


def _memory(plan: Plan) -> list[str]:
    found, room = plan.memory, plan.memory.room
    lines = [_row("memory of one", "GiB"), *(_row(k, f"{v / GIB:.2f}") for k, v in found.items.items())]
    lines.append(_row("in all", f"{found.total / GIB:.2f}") + f" of {room / GIB:.0f}: " + _verdict(plan))
    lines += [_row("", f"{way.total / GIB:.2f}") + f" with {words}" for words, way in plan.ways_out]
    return lines


def _verdict(plan: Plan) -> str:
    if plan.memory.fits:
        return "fits"
    if plan.ways_out:
        return "does not fit; it does"
    return "does not fit, nor would it in the smallest chunks: take larger or more accelerators, or a smaller model"


def _work(plan: Plan) -> list[str]:
    whole = sum(part.both for part in plan.work.values())
    lines = [_row("GFLOP of one pair", "forward") + f"{'backward':>12}{'share':>8}"]
    for name, part in plan.work.items():
        share = f"{100 * part.both / whole:.0f} %"
        lines.append(_row(name, f"{part.forward / 1e9:.1f}") + f"{part.backward / 1e9:12.1f}{share:>8}")
    lines.append(_row("in all", f"{whole / 1e9:.1f}") + f"; a step {_number(plan.step_flops / 1e12)} TFLOP")
    return lines


def _time(plan: Plan) -> list[str]:
    rate = plan.step_pairs / plan.seconds
    source = "as measured" if plan.measured else "assumed"
    lines = [
        f"a step takes {_number(plan.seconds)} s, bound by {plan.bound}, at {100 * plan.efficiency:.3g} % of the peak "
        f"({source}): {_number(1 / plan.seconds)} steps and {_number(rate)} pairs a second",
        f"{plan.settings.train.steps:,} steps take {_duration(plan.days * DAY)}",
        f"features of {plan.images:,} images in a cache: {_size(plan.cache['fp16'])} in fp16; "
        f"to write it takes {_duration(plan.cache_seconds)}",
    ]
    if plan.cached:
        lines.append(
            f"a step reads {_size(plan.reads)} of it in fp16, all machines together: "
            f"{_size(plan.reads / plan.seconds)} a second"
        )
    return lines


def _network(plan: Plan) -> list[str]:
    lines = [_row("sent by one in a step", "MB")]
    for flow in plan.flows:
        lines.append(_row(("" if flow.chosen else "  ") + flow.name, f"{flow.bytes / 1e6:,.1f}"))
    link, seconds = plan.cluster.slowest_link, plan.network_seconds
    lines.append(
        f"{_number(seconds)} s on the slowest link ({link / 1e9:.3g} GB a second), "
        f"{100 * seconds / plan.seconds:.0f} % of the step if nothing overlaps"
    )
    return lines


def assumptions(plan: Plan) -> list[str]:
    """One line for each assumption that moves the figures."""
    kind, low, high = plan.cluster.kind, *PUBLISHED
    reach = (
        f"published runs reach {100 * low:.0f} to {100 * high:.0f} % of a GPU's peak"
        if kind.fused
        else "here of the fastest matrix product that was measured"
    )
    lines = [
        f"efficiency: time is as 1 / it; {reach}; `--efficiency` or `--measured` sets yours",
        f"text: every caption is padded to {plan.text} tokens; batches of shorter ones cost less (`--text-tokens`)",
    ]
    if kind.fused:
        lines.append("memory: attention keeps no probabilities, 5 % are lost in fragments, 0.8 GiB are CUDA's own")
    else:
        lines.append(
            "memory: of what comes and goes in a step 30 % are lost in fragments; the interpreter is not in it"
        )
    if not kind.bf16 and kind.fused:
        lines.append(f"precision: {kind.name} has no bf16 products, in which this code computes: expect far less speed")
    if plan.flows:
        lines.append("network: rings through all accelerators; its time is not added, for the efficiency has it in it")
    if plan.settings.data.augment and plan.cached:
        lines.append("cache: with data.augment=true it needs views, each as large as the plain picture")
    if plan.language is not None:
        lines.append("language model: its captions take as many tokens as the Q-Former's would")
    if not plan.cached:
        rate = plan.step_pairs / plan.seconds
        lines.append(f"data: {rate:,.0f} pictures a second are opened and decoded in time")
    return lines


def against_paper(plan: Plan, name: str) -> str | None:
    """What the paper's days imply for its own presets; None for others, and for another batch or number of steps."""
    stage, train = plan.settings.stage, plan.settings.train
    if name != f"{stage}-{WHOSE[stage]}":
        return None
    theirs = preset(stage, WHOSE[stage]).train
    if (train.steps, plan.step_pairs) != (theirs.steps, theirs.batch):
        return None
    flops = paper_flops(plan.former, plan.encoder, plan.language)
    share = implied_efficiency(stage, train.steps, train.batch, flops)
    text = TEXT if plan.language is None else plan.text
    return (
        f"paper: under {DAYS[stage]} days on {GPUS_OF_IT} A100-40G. Its way, captions padded to {text} tokens, takes "
        f"{flops / 1e9:,.0f} GFLOP a pair: at least {100 * share:.1f} % of the peak"
    )


def as_values(plan: Plan, name: str) -> dict[str, Any]:
    """All figures, ready for JSON: bytes, seconds, floating-point operations."""
    return {
        "preset": name,
        "gpus": {"kind": plan.cluster.kind.name, "count": plan.cluster.count, "machines": plan.cluster.machines},
        "peak_flops": plan.cluster.kind.flops,
        "parallel": plan.settings.train.parallel,
        "parameters": {
            "encoder": plan.encoder.parameters,
            "language": None if plan.language is None else plan.language.parameters,
            "trained": plan.trained,
        },
        "memory": {
            "items": plan.memory.items,
            "total": plan.memory.total,
            "room": plan.memory.room,
            "fits": plan.memory.fits,
            "ways_out": {words: way.total for words, way in plan.ways_out},
        },
        "flops_of_a_pair": {k: {"forward": v.forward, "backward": v.backward} for k, v in plan.work.items()},
        "step": {
            "pairs": plan.step_pairs,
            "flops": plan.step_flops,
            "seconds": plan.seconds,
            "bound": plan.bound,
            "efficiency": plan.efficiency,
            "efficiency_measured": plan.measured,
            "network_seconds": plan.network_seconds if plan.flows else 0.0,
            "sent": {flow.name: flow.bytes for flow in plan.flows},
            "reads": plan.reads,
        },
        "steps": plan.settings.train.steps,
        "days": plan.days,
        "cache": {"images": plan.images, "bytes": plan.cache, "seconds": plan.cache_seconds},
        "assumptions": assumptions(plan),
    }


def _row(name: str, value: str) -> str:
    return f"{name:{WIDTH}}{value:>10}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{_number(count / size)} {unit}"
    return f"{_number(count / 1e6)} MB"


def _duration(seconds: float) -> str:
    for unit, size in (("days", DAY), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{_number(seconds / size)} {unit}"
    return f"{_number(seconds)} seconds"
