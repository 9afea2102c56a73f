"""Saves the pictures of a notebook's source that runs as a plain script: figures/NAME-1.png, figures/NAME-2.png, ..

The first cell of every source imports this module; `build.py` leaves that cell out of the notebook, which shows its
pictures itself.
"""

import sys
from itertools import count
from pathlib import Path

import matplotlib

matplotlib.use("agg")  # no window
import matplotlib.pyplot as plt

from gptjax import show

FOLDER = Path("figures").resolve()  # of the folder that the script was started in
_numbers = count(1)
_init = show.Picture.__init__


def save(figure) -> None:
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{Path(sys.argv[0]).stem}-{next(_numbers)}.png")


def _init_and_save(picture, figure) -> None:
    _init(picture, figure)
    save(figure)


def _save_and_close() -> None:
    save(plt.gcf())
    plt.close()


show.Picture.__init__ = _init_and_save
plt.show = _save_and_close
