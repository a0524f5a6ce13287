"""Tables in Markdown, as their lines."""

from collections.abc import Iterable, Mapping


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table(header: str, lines: Iterable[str]) -> list[str]:
    """The header `| a | b |`, and a line for each row."""
    return [header, "|---" * (header.count("|") - 1) + "|", *lines]


def crossed(title: str, cells: Mapping[tuple[str, str], str]) -> list[str]:
    """Cells by the names of their row and column, both in the order in which they first come; some may be missing."""
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    return table(
        line(title, *columns), (line(row, *(cells.get((row, column), "") for column in columns)) for row in rows)
    )
