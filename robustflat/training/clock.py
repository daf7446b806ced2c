"""How fast training goes and how long it will take."""

from __future__ import annotations

import time


class Clock:
    """Seconds, images and steps since the start of `fit`."""

    def __init__(self) -> None:
        self.images = self.steps = 0
        self._start = self._last = time.perf_counter()
        self._last_images = 0
        self._rate = 0.0

    def skip(self) -> None:
        """Leave the time since the last reading, spent on evaluating and saving, out of the speed."""
        self._last = time.perf_counter()

    def read(self, steps_left: int) -> dict[str, float]:
        """Values to log: seconds so far, speed since the last reading, and seconds left for so many more steps."""
        now = time.perf_counter()
        if self.images > self._last_images:  # the end of an epoch may follow another read at once
            self._rate = (self.images - self._last_images) / max(now - self._last, 1e-9)
            self._last, self._last_images = now, self.images
        seconds = now - self._start
        return {
            "time/seconds": seconds,
            "time/images_per_second": self._rate,
            "time/seconds_left": seconds / max(self.steps, 1) * steps_left,
        }
