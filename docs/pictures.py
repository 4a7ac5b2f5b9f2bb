"""Draw the pictures of README.md, of the home page and of looking.md from the demo's small world.

``python docs/pictures.py README`` draws docs/pictures/demo.png anew, which README.md shows and the repository holds.
The site draws its own when it is built (docs/conf.py), on a light and on a dark page.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

from matplotlib import pyplot as plt
from PIL import Image

import rasteret_dask as rd
from rasteret_dask.demo.run import SMALL, demo_chips
from rasteret_dask.demo.world import make_world
from rasteret_dask.show.plot import contact_sheet, plot_chips

DOCS = Path(__file__).parent
LIGHT = {"savefig.facecolor": "white"}
DARK = {
    "savefig.facecolor": "#14181e",  # the theme's own page
    "text.color": "#ced6dd",
    "axes.labelcolor": "#ced6dd",
    "axes.edgecolor": "#828d98",
    "axes.facecolor": "#14181e",
    "xtick.color": "#ced6dd",
    "ytick.color": "#ced6dd",
}


def demo_of(folder: Path) -> rd.Chips:
    """Return the demo's chips on its small world, made in ``folder`` unless it is there."""
    return demo_chips(make_world(folder, size=SMALL.world), SMALL)


def draw(chips: rd.Chips, path: Path, page: dict[str, str], dpi: int = 110) -> None:
    """Draw the map of splits beside three of the train chips, in the colours of a page."""
    with plt.rc_context(page):
        figure = plt.figure(figsize=(11.4, 4.5), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(6, 6), wspace=0.03)
        plot_chips(chips.table, ax=left.subplots())
        contact_sheet(chips.select("train").to_xarray(), 3, figure=right)
        if page is DARK:  # the sheet's own ink is for a light page
            for axes in right.axes:
                axes.title.set_color(page["text.color"])
                axes.xaxis.label.set_color(page["text.color"])
        figure.savefig(path, dpi=dpi)
        plt.close(figure)


LOOKING = ("records.png", "spectra.png", "preview.png", "chips.png")
"""What looking.md shows. These pictures have no background: one serves light and dark pages."""


def draw_looking(folder: Path, world: Path) -> None:
    """Run the blocks of looking.md in a folder, unless its pictures are there: each is what the line above it makes."""
    if all((folder / name).is_file() for name in LOOKING):
        return
    make_world(world, size=SMALL.world)
    (folder / "demo").mkdir(parents=True, exist_ok=True)
    if not (folder / "demo" / "world").exists():
        (folder / "demo" / "world").symlink_to(world.resolve())
    names: dict[str, object] = {}
    page = DOCS / "looking.md"
    quiet = io.StringIO()  # progress goes to stderr
    with contextlib.chdir(folder), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            exec(compile(block, str(page), "exec"), names)


if __name__ == "__main__":
    if sys.argv[1:] != ["README"]:
        raise SystemExit("usage: python docs/pictures.py README")
    made = DOCS / "pictures" / "demo.png"
    made.parent.mkdir(exist_ok=True)
    draw(demo_of(DOCS / "_made" / "world"), made, LIGHT)
    Image.open(made).convert("RGB").quantize(256).save(made, optimize=True)  # a third of the bytes
    print(made, made.stat().st_size, "bytes")
