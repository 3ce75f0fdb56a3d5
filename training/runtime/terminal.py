"""What a person sees while a run goes on: a progress bar on a terminal, plain lines in a file."""

import sys
import textwrap
import time
from collections.abc import Iterable, Mapping
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

CONSOLE = Console(highlight=False, soft_wrap=True)
WIDTH = 80  # columns of a message that is laid out
# No word is broken, for it may be a path or a command that somebody copies.
_fill = partial(textwrap.fill, width=WIDTH, break_long_words=False, break_on_hyphens=False)


def say(text: str) -> None:
    """Prints sentences, above the progress bar if there is one; on a terminal within 80 columns."""
    # In a file each stays on one line, where `grep` finds the whole of it.
    show(wrapped(text) if CONSOLE.is_terminal else text)


def show(text: str) -> None:
    """The same with what is laid out already: tables, commands, samples."""
    CONSOLE.print(text, markup=False)


def wrapped(text: str) -> str:
    """Lines broken at 80 columns, between words; what goes on is indented further than its line.

    Example:
      >>> print(wrapped("  steps: " + "a word and another, " * 4))
        steps: a word and another, a word and another, a word and another, a word and
          another,
    """
    lines: list[str] = []
    for line in text.split("\n"):
        margin = " " * (len(line) - len(line.lstrip()) + 2)
        lines.append(_fill(line, subsequent_indent=margin) if len(line) > WIDTH else line)
    return "\n".join(lines)


def for_errors(error: Exception | str) -> str:
    """A message as it goes to stderr: broken at 80 columns on a terminal, in a file as it is."""
    return wrapped(str(error)) if sys.stderr.isatty() else str(error)


def labelled(pairs: Iterable[tuple[str, str]]) -> str:
    """Lines `label: text` in at most 80 columns; a word longer than that is left whole.

    Example:
      >>> print(labelled([("run", "runs/lm"), ("device", "cpu")]))
      run: runs/lm
      device: cpu
    """
    return "\n".join(_fill(f"{label}: {text}", subsequent_indent="  ") for label, text in pairs)


def folded(label: str, command: str) -> str:
    """A command in at most 80 columns, continued as a shell continues lines.

    Example:
      >>> print(folded("go on  ", "python train.py " + "seed=1 " * 9))
      go on  python train.py seed=1 seed=1 seed=1 seed=1 seed=1 seed=1 seed=1 seed=1 \\
             seed=1
    """
    if "'" in command:  # within quotes a backslash would be one
        return label + command
    room = WIDTH - len(label) - len(" \\")
    lines = textwrap.wrap(command, room, break_long_words=False, break_on_hyphens=False)
    return label + f" \\\n{' ' * len(label)}".join(lines)


def figures(metrics: Mapping[str, float], digits: int = 4) -> str:
    """Metrics for a person, the loss first.

    Example:
      >>> figures({"accuracy": 0.5, "loss": 1.25})
      'loss 1.2500  accuracy 0.5000'
    """
    names = sorted(metrics, key=lambda name: name != "loss")
    return "  ".join(f"{name} {metrics[name]:.{digits}f}" for name in names)


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
        self._steps, self.examples, self._show = steps, examples, progress
        # The row before, for the speed between two rows.
        self._clock: tuple[int, float] | None = None
        # The first step that was seen to end, and when: an end is reckoned from there on. So the
        # compilation before it does not count, and the evaluations after it do, as they go on.
        self._began: tuple[int, float] | None = None
        self._left = ""
        self._bar: Progress | None = None
        if progress and CONSOLE.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=CONSOLE,
                expand=True,
            )
            self._task = self._bar.add_task("", total=steps, completed=start, text="", left="")

    def __enter__(self) -> "Terminal":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def at(self, step: int) -> None:
        """Takes notice that a step has ended, of which there need not be a row."""
        now = time.perf_counter()
        if self._began is None:
            self._began = step, now
        first, began = self._began
        if step > first:
            self._left = f"{clock((now - began) / (step - first) * (self._steps - step))} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, left=self._left)

    def step(self, step: int, loss: float) -> float | None:
        """Shows the loss of a step whose metrics have arrived.

        Returns:
            Seconds per step since the last call; None at the first.
        """
        self.at(step)
        now = time.perf_counter()
        before, self._clock = self._clock, (step, now)
        seconds = None
        text = f"loss {loss:.4f}"
        if before is not None and step > before[0]:
            seconds = (now - before[1]) / (step - before[0])
            text += f"  {self.examples / seconds:,.0f} examples/s"
        if self._bar is not None:
            self._bar.update(self._task, text=text)
        elif self._show:
            say(f"step {step}/{self._steps}  {text}  {self._left}".rstrip())
        return seconds

    def pause(self) -> None:
        """Forgets the time, so that what is not training (evaluation, say) does not count."""
        self._clock = None


def clock(seconds: float) -> str:
    """A time as people read it.

    Example:
      >>> clock(75), clock(3675)
      ('1:15', '1:01:15')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
