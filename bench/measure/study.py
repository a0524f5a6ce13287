"""What the studies share that train or take runs: the look of a figure, and the files of a record."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.measure.place import Record, path_in
from train.metrics import write_record


def style(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path, title: str, dpi: int) -> None:
    figure.suptitle(title)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def write_study(
    out: Path, name: str, record: Record, draw: Callable[[Path], None], page: Callable[[Path], str]
) -> Path:
    """Write `<date>-<device>-<name>.json`, its figure `.png` and its page `.md`, which is printed too."""
    out.mkdir(parents=True, exist_ok=True)
    path = path_in(out, record, f"-{name}.json")
    figure = path.with_suffix(".png")
    write_record(path, record)
    draw(figure)
    text = page(figure)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return path
