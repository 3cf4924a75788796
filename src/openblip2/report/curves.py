"""Small line charts as inline SVG: what a training log holds, drawn without a plotting library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 460, 270  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 14, 42  # margins that hold the labels
MOST_POINTS = 300  # of a line: more than can be told apart


@dataclass(frozen=True)
class Series:
    """One curve. `dotted`: marks at its points, joined by a thin line, for values measured now and then."""

    name: str
    points: Sequence[Point]
    dotted: bool = False


def smooth(points: Sequence[Point], reach: int) -> list[Point]:
    """At most `MOST_POINTS` of the points, each the mean of itself and `reach` neighbours on either side."""
    found = []
    for n in range(0, len(points), max(1, math.ceil(len(points) / MOST_POINTS))):
        near = [y for _, y in points[max(0, n - reach) : n + reach + 1]]
        found.append((points[n][0], sum(near) / len(near)))
    return found


def chart(title: str, series: Sequence[Series], level: tuple[str, float] | None = None) -> str:
    """A figure with a loss over steps, from zero, its legend and a summary for those who do not see it.

    Args:
        title: the heading. series: at least one point in all. level: name and height of a horizontal line.
    """
    drawn = [s for s in series if s.points]
    right = max(x for s in drawn for x, _ in s.points)
    top = max([y for s in drawn for _, y in s.points] + ([level[1]] if level else [])) or 1.0
    step_x, step_y = tick_step(right, 5), tick_step(top * 1.05, 5)
    high = step_y * math.ceil(top * 1.05 / step_y)

    def at(x: float, y: float) -> str:
        across = LEFT + x / max(right, 1e-9) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - y / high * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = [_grid_y(n * step_y, at, right) for n in range(round(high / step_y) + 1)]
    parts += [_tick_x(n * step_x, at) for n in range(int(right / step_x + 1e-9) + 1)]
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">loss in nats</text>')
    if level:
        parts.append(_level(level, at, right))
    parts += [_curve(s, n, at) for n, s in enumerate(drawn, 1)]
    label = escape(f"{title}, loss over steps. {_summary(drawn, level)}")
    return (
        f'<figure class="chart"><h4>{escape(title)}</h4>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
        f"<figcaption>{''.join(_legend(s, n) for n, s in enumerate(drawn, 1))}</figcaption></figure>"
    )


def tick_step(span: float, count: int) -> float:
    """The round number (1, 2 or 5 times a power of ten) that parts `span` in at most `count` steps."""
    rough = max(span, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))


def _grid_y(value: float, at, right: float) -> str:
    start, end = at(0, value), at(right, value)
    x, y = start.split(",")
    label = f'<text x="{float(x) - 6}" y="{float(y) + 4}" text-anchor="end">{value:g}</text>'
    return f'<polyline class="grid" points="{start} {end}"/>{label}'


def _tick_x(value: float, at) -> str:
    x, y = at(value, 0).split(",")
    return f'<text x="{x}" y="{float(y) + 16}" text-anchor="middle">{value:g}</text>'


def _level(level: tuple[str, float], at, right: float) -> str:
    name, value = level
    start, end = at(0, value), at(right, value)
    x, y = end.split(",")
    label = f'<text x="{x}" y="{float(y) - 5}" text-anchor="end">{escape(name)} {value:.4g}</text>'
    return f'<polyline class="level" points="{start} {end}"/>{label}'


def _curve(series: Series, number: int, at) -> str:
    places = [at(x, y) for x, y in series.points]
    kind = "thin" if series.dotted else "line"
    line = f'<polyline class="{kind} c{number}" points="{" ".join(places)}"/>'
    if not series.dotted and len(places) > 1:
        return line
    dots = ('<circle cx="{}" cy="{}" r="4"/>'.format(*place.split(",")) for place in places)
    return f'{line}<g class="dot c{number}">{"".join(dots)}</g>'


def _legend(series: Series, number: int) -> str:
    mark = (
        f'<g class="dot c{number}"><circle cx="9" cy="6" r="4"/></g>'
        if series.dotted
        else f'<polyline class="line c{number}" points="0,6 18,6"/>'
    )
    drawing = f'<svg class="key" viewBox="0 0 18 12" aria-hidden="true">{mark}</svg>'
    return f"<span>{drawing} {escape(series.name)} <b>{series.points[-1][1]:.3f}</b></span> "


def _summary(series: Sequence[Series], level: tuple[str, float] | None) -> str:
    said = [
        f"{s.name}: {s.points[0][1]:.2f} at step {s.points[0][0]:g}, {s.points[-1][1]:.2f} at step {s.points[-1][0]:g}"
        for s in series
    ]
    return "; ".join(said + ([f"{level[0]}: {level[1]:.4g}"] if level else [])) + "."
