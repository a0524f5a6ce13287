"""Tables in Markdown, as their lines."""

from collections.abc import Iterable, Mapping, Sequence


def table(header: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """The header `| a | b |`, and a line for each row of cells."""
    return [header, "|---" * (header.count("|") - 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def crossed(title: str, cells: Mapping[tuple[str, str], str]) -> list[str]:
    """Cells by the names of their row and column, both in the order in which they first come; some may be missing."""
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    header = f"| {' | '.join((title, *columns))} |"
    return table(header, ([row, *(cells.get((row, column), "") for column in columns)] for row in rows))
