"""Progress in the terminal: a live bar where there is one, plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from robustflat.loggers.base import Null
from robustflat.types import Scalars


class ConsoleLogger(Null):
    """Shows loss, robust error, images per second and time left.

    On a terminal a bar moves with every call and one line stays per epoch; elsewhere (a file, a job's output)
    there is only the line. Reads what `Trainer` logs: "train/*", "epoch/*", "time/*"; other metrics, such as
    those of evaluations, get a line of their own, with the errors only if there are any.

    Args:
        epochs: of the whole training, for "epoch 3/60"; `None`: leave that out.
        console: where to write; `None`: standard output.
    """

    def __init__(self, *, epochs: int | None = None, console: Console | None = None) -> None:
        self.epochs = epochs
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None

    def log(self, metrics: Scalars, *, step: int) -> None:
        """Show one call of the trainer or of an evaluation."""
        if "time/progress" in metrics and self.console.is_terminal:
            self._move_bar(metrics)
        line = self._line(metrics, step)
        if line:
            self.console.print(line, markup=False)

    def finish(self, status: str) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _move_bar(self, metrics: Scalars) -> None:
        if self._progress is None:
            columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._progress.add_task("", total=1.0)
            self._progress.start()
        shown = {name.partition("/")[2]: value for name, value in metrics.items()}
        self._progress.update(
            self._progress.task_ids[0],
            completed=metrics["time/progress"],
            description=_described(shown),
        )

    def _line(self, metrics: Scalars, step: int) -> str:
        if any(name.startswith("train/") for name in metrics):
            return ""
        if "epoch" in metrics:
            shown = {name.partition("/")[2]: value for name, value in metrics.items()}
            total = f"/{self.epochs}" if self.epochs else ""
            return f"epoch {metrics['epoch']:g}{total}  {_described(shown)}"
        shown = {name: value for name, value in metrics.items() if not name.startswith("time/")}
        watched = {name: value for name, value in shown.items() if name.endswith(_WATCHED)}
        values = [_formatted(name, value) for name, value in (watched or shown).items()]
        return f"step {step}  {'  '.join(values)}" if values else ""


_WATCHED = ("test_error", "test_robust_error", "test_robust_loss", "train_robust_error", "train_robust_loss")


def _described(shown: Scalars) -> str:
    """Text of the values that people watch; names without their first part."""
    texts = []
    if "loss" in shown:
        texts.append(f"loss {shown['loss']:.3f}")
    if "error" in shown:
        texts.append(f"robust error {shown['error']:.1%}")
    if "images_per_second" in shown:
        texts.append(f"{shown['images_per_second']:,.0f} images/s")
    if "seconds_left" in shown:
        texts.append(f"{duration(shown['seconds_left'])} left")
    return "  ".join(texts)


def _formatted(name: str, value: float) -> str:
    name = name.removeprefix("evaluation/")
    return f"{name} {value:.1%}" if name.endswith("error") else f"{name} {value:.3f}"


def duration(seconds: float) -> str:
    """Seconds as "1:05" or "2:03:04"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
