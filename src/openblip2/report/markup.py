"""Small pieces of HTML and numbers in words."""

from collections.abc import Sequence


def percent(share: float | None) -> str:
    """0.4567 -> "45.7 %"; None -> "not measured"."""
    return "not measured" if share is None else f"{100 * share:.1f}\u00a0%"


def duration(seconds: float) -> str:
    """75.2 -> "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"


def bar(share: float, mark: float | None = None) -> str:
    """A bar filled to `share`, with an upright line at `mark`, both in [0, 1]; for numbers in words too."""
    tick = "" if mark is None else f'<b style="left:{100 * mark:.1f}%"></b>'
    return f'<div class="bar" aria-hidden="true"><i style="width:{100 * share:.1f}%"></i>{tick}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; the first cell of each row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' if cell else "<td></td>" for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
