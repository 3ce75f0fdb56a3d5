"""What a person sees while a run goes on: a progress bar on a terminal, plain lines in a file."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

CONSOLE = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Prints a message, above the progress bar while there is one."""
    CONSOLE.print(text, markup=False)


class Terminal:
    """The progress of one run; use as a context manager."""

    def __init__(self, steps: int, start: int, examples: int, *, progress: bool) -> None:
        """
        Args:
            steps: the step the run ends at.
            start: the step it goes on from.
            examples: examples per step, for the throughput.
            progress: False for no progress at all, messages alone.
        """
        self._steps, self._examples, self._show = steps, examples, progress
        self._clock: tuple[int, float] | None = None
        self._bar: Progress | None = None
        if progress and CONSOLE.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=CONSOLE,
            )
            self._task = self._bar.add_task("", total=steps, completed=start, text="")

    def __enter__(self) -> "Terminal":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, loss: float) -> float | None:
        """Shows the loss of a step whose metrics have arrived.

        Returns:
            Examples per second since the last call; None at the first.
        """
        now = time.perf_counter()
        before, self._clock = self._clock, (step, now)
        rate = None
        text = f"loss {loss:.4f}"
        if before is not None and step > before[0]:
            seconds = (now - before[1]) / (step - before[0])
            rate = self._examples / seconds
            text += f"  {rate:,.0f} examples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif self._show:
            if rate is not None:
                text += f"  {_clock((self._steps - step) * self._examples / rate)} left"
            say(f"step {step}/{self._steps}  {text}")
        return rate

    def pause(self) -> None:
        """Forgets the time, so that what is not training (evaluation, say) does not count."""
        self._clock = None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
