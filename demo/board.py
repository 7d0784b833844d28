"""Pictures as they are drawn: what is known of each, the HTML that shows them, and how long it will still take."""

from __future__ import annotations

import base64
import io
import re
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape

import numpy as np
from PIL import Image

from autoregressive.serve.cards import Card
from autoregressive.serve.requests import Drawn, Event, Progress, Request
from demo.about import again
from utils.image import png_bytes

_CRISP = 128  # pixels: smaller pictures are enlarged without blur
_WEB_QUALITY = 85  # of previews of larger pictures; what is saved is always PNG


@dataclass
class Tile:
    """One picture on its way."""

    done: int = 0
    total: int = 0
    picture: np.ndarray | None = None
    finished: bool = False


@dataclass
class Board:
    """The pictures of one request. `clock` gives seconds."""

    request: Request
    card: Card
    clock: Callable[[], float] = time.monotonic
    tiles: list[Tile] = field(default_factory=list)
    first_report: float | None = None
    finished_at: float | None = None

    def __post_init__(self) -> None:
        self.tiles = [Tile(total=self.card.grid**2) for _ in range(self.request.n)]
        self.asked = self.clock()

    def take(self, event: Event) -> None:
        """Note what happened to a picture."""
        tile, now = self.tiles[event.number], self.clock()
        self.first_report = now if self.first_report is None else self.first_report
        if isinstance(event, Drawn):
            tile.picture, tile.finished, tile.done = event.picture, True, tile.total
            self.finished_at = now
        elif isinstance(event, Progress) and not tile.finished:
            tile.done, tile.total = event.done, event.total
            tile.picture = tile.picture if event.preview is None else event.preview

    @property
    def finished(self) -> bool:
        """Whether all pictures are there."""
        return all(tile.finished for tile in self.tiles)

    @property
    def codes(self) -> tuple[int, int]:
        """Codes that are drawn, and all codes."""
        return sum(tile.done for tile in self.tiles), sum(tile.total for tile in self.tiles)

    def seconds_left(self) -> float | None:
        """As far as one can tell."""
        done, total = self.codes
        if self.first_report is None or not done:
            return None
        return (self.clock() - self.asked) / done * (total - done)

    def in_words(self) -> str:
        """How far it is, for people."""
        done, total = self.codes
        if self.finished:
            return f"{pictures(len(self.tiles))} in {seconds((self.finished_at or self.asked) - self.asked)}"
        if self.first_report is None:
            return f"Waiting for a free place, {seconds(self.clock() - self.asked)} so far"
        left = self.seconds_left()
        ready = sum(tile.finished for tile in self.tiles)
        words = [f"{done:,} of {total:,} codes", f"{seconds(left)} left" if left is not None else ""]
        words.append(f"{ready} of {pictures(len(self.tiles))} ready" if ready else "")
        return ", ".join(filter(None, words))

    def files(self) -> dict[str, bytes]:
        """The finished pictures as PNG files that hold their settings, by file name."""
        return {
            file_name(self.request, self.card, number): png_bytes(tile.picture, self.request.facts(self.card, number))
            for number, tile in enumerate(self.tiles)
            if tile.finished and tile.picture is not None
        }


def pictures(count: int) -> str:
    """ "1 picture", "3 pictures"."""
    return f"{count} picture{'' if count == 1 else 's'}"


def seconds(value: float) -> str:
    """Seconds or minutes, no more exact than one cares for."""
    if value < 10:
        return f"{value:.1f} s" if value < 1 else f"{value:.0f} s"
    return f"{value:.0f} s" if value < 90 else f"{value / 60:.0f} min"


def subject_name(request: Request, card: Card) -> str:
    """What the pictures are of."""
    if card.classes is None:
        return str(request.subject)
    return card.classes.name(int(request.subject)) or f"class {request.subject}"


def file_name(request: Request, card: Card, number: int) -> str:
    """``{model}-{what}-{seed}.png``, in letters that every system takes."""
    words = re.sub(r"\W+", "-", f"{card.name}-{subject_name(request, card)[:60]}", flags=re.UNICODE).strip("-").lower()
    return f"{words}-{request.seed + number}.png"


def board_html(board: Board) -> str:
    """All pictures; the finished ones can be saved."""
    names = [file_name(board.request, board.card, i) for i in range(len(board.tiles))]
    files = board.files()
    figures = [_figure(board, number, files.get(name), name) for number, name in enumerate(names)]
    count = min(len(figures), 10)
    return f'<div class="board of-{count}" role="group" aria-label="Pictures">{"".join(figures)}</div>'


def _figure(board: Board, number: int, file: bytes | None, name: str) -> str:
    tile, seed = board.tiles[number], board.request.seed + number
    what = f"{subject_name(board.request, board.card)}, picture {number + 1} of {len(board.tiles)}, seed {seed}"
    crisp = " crisp" if board.card.edge <= _CRISP else ""
    if tile.picture is None:
        shown = f'<div class="blank" role="img" aria-label="{escape(what)}: not begun"></div>'
    else:
        source = data_uri(file, "png") if file else _preview_uri(tile.picture)
        state = "" if tile.finished else f": {tile.done} of {tile.total} codes"
        shown = f'<img class="picture{crisp}" decoding="sync" src="{source}" alt="{escape(what + state)}">'
    save = _SAVE.format(name=escape(name), label=escape(f"Save picture {number + 1} as PNG")) if file else ""
    state = "finished" if tile.finished else "drawing"
    return (
        f'<figure class="tile" data-state="{state}" data-seed="{seed}">{shown}'
        f"<figcaption><span>seed {seed}</span>{save}</figcaption></figure>"
    )


# The file is in the page once, as the picture that is seen.
_SAVE = (
    '<a class="save" download="{name}" href="#" aria-label="{label}" '
    "onclick=\"this.href = this.closest('figure').querySelector('img').src\">Save PNG</a>"
)


def _preview_uri(picture: np.ndarray) -> str:
    if picture.shape[0] <= _CRISP:
        return data_uri(png_bytes(picture), "png")
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="JPEG", quality=_WEB_QUALITY)
    return data_uri(content.getvalue(), "jpeg")


def data_uri(content: bytes, kind: str) -> str:
    """A file within the page: png, jpeg or zip."""
    mime = "application/zip" if kind == "zip" else f"image/{kind}"
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def status_html(board: Board, state: str = "", message: str = "") -> str:
    """The line above the pictures: a bar and words. `state` is drawing, done, stopped or failed."""
    state = state or ("done" if board.finished else "drawing")
    done, total = board.codes
    words = message or board.in_words()
    bar = f'<progress value="{done}" max="{total}" aria-label="Codes drawn"></progress>' if state == "drawing" else ""
    return note_html(words, state, bar)


def note_html(words: str, state: str, bar: str = "") -> str:
    """A line for people; errors are read out at once, the rest when there is time."""
    role = "alert" if state == "failed" else "status" if state != "drawing" else "none"
    return f'<div class="note {state}" data-state="{state}"><p role="{role}">{escape(words)}</p>{bar}</div>'


def again_html(board: Board) -> str:
    """The pictures as one file, and what draws them again."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, data in board.files().items():
            archive.writestr(name, data)
    name = re.sub(r"-\d+\.png$", ".zip", file_name(board.request, board.card, 0))
    line = again(board.request, board.card)
    details = (
        f"<details><summary>Draw these again, without this page</summary>"
        f'<pre tabindex="0" aria-label="What draws these again">{escape(line)}</pre></details>'
    )
    save = f'<a class="save all" download="{escape(name)}" href="{data_uri(content.getvalue(), "zip")}">Save all</a>'
    return f'<div class="again">{save if len(board.tiles) > 1 else ""}{details if line else ""}</div>'
