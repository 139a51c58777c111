"""Progress of an edit on a terminal: the bar names the phase, and its clock moves during a long step, too."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

from tqdm import tqdm

REDRAW_SECONDS = 2.0


@contextmanager
def moving_bar(**options: Any) -> Iterator[tqdm]:
    """Show a bar that is also redrawn while nothing is counted; `options` are tqdm's."""
    stopped = Event()
    with tqdm(**options) as bar, ThreadPoolExecutor(1) as beside:

        def redraw() -> None:
            while not stopped.wait(REDRAW_SECONDS):
                bar.refresh()

        beside.submit(redraw)
        try:
            yield bar
        finally:
            stopped.set()


@contextmanager
def edit_progress(rounds: int, num_steps: int) -> Iterator[dict[str, Any]]:
    """Show an edit in several rounds of steps; yield the keywords `on_phase` and `on_step` for the editor."""
    with moving_bar(total=rounds * num_steps, desc="encoding", unit="step") as bar:

        def on_phase(phase: str) -> None:
            bar.set_description(phase)
            if phase == "painting":
                bar.unpause()  # the time per step is that of steps alone

        def on_step(_step: int, num_steps: int, *_: object) -> None:
            bar.total = rounds * num_steps  # some samplers take one more than they are asked for
            bar.update()

        yield {"on_phase": on_phase, "on_step": on_step}
