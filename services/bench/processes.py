"""Memory of this process and all that it started, watched from a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

_SECONDS = 0.5


class PeakMemory:
    """The highest resident set of a process of each name, in bytes; and of all processes together over time."""

    def __init__(self) -> None:
        self.peak: dict[str, int] = {}
        self.totals: list[int] = []
        """Sum over processes at each look, half a second apart. Shared memory counts in each of them."""

    def look(self) -> None:
        """Sample once."""
        me = psutil.Process()
        total = 0
        for process in [me, *me.children(recursive=True)]:
            with suppress(psutil.Error):
                size = process.memory_info().rss
                name = _name(process)
                self.peak[name] = max(size, self.peak.get(name, 0))
                total += size
        self.totals.append(total)


def _name(process: psutil.Process) -> str:
    """Of the program, or of Ray's task or actor without the method that it runs just now."""
    words = process.cmdline()
    if words and words[0].startswith("ray::"):
        return words[0].partition(".")[0]
    return process.name()


@contextmanager
def watched() -> Iterator[PeakMemory]:
    """Sample for as long as the block runs."""
    memory, done = PeakMemory(), threading.Event()

    def watch() -> None:
        while not done.wait(_SECONDS):
            memory.look()

    thread = threading.Thread(target=watch, name="memory", daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()
