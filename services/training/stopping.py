"""SIGTERM and SIGINT: what a cluster and a person say to end a run, which then ends in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from flam_core.errors import Stopped
from services.watch import Watch

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_SECONDS = 0.2


class Stopping:
    """While it is entered, a signal to end raises Stopped; while workers are at it (`run`), it first has them commit.

    A second signal ends the run at once, with what was committed before. Outside the main thread there are no signals.
    """

    def __init__(self) -> None:
        self._watch: Watch | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._signals = 0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals over, again once Ray is started: it puts handlers of its own in place, which abort."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._heard)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        name = signal.Signals(number).name
        if self._watch is not None and self._watch.steps_run and self._signals == 1:
            print(f"{name}: the workers commit a checkpoint and end", flush=True)
            self._watch.stop(name)
            return
        raise Stopped(f"stopped by {name}", fix="The same command goes on from the newest committed step.")

    def run(self, action: Callable[[], Any], watch: Watch, on_stop: Callable[[], None]) -> None:
        """Do it in another thread, while this one can hear signals; raises what it raises.

        `on_stop` is called once the workers were told to stop, while they commit: whoever sent the signal may not wait
        for the end.
        """
        failures: list[BaseException] = []

        def act() -> None:
            try:
                action()
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                failures.append(error)

        thread = threading.Thread(target=act, name="fit", daemon=True)
        self._watch = watch
        try:
            thread.start()
            told = False
            while thread.is_alive():
                thread.join(_LOOK_SECONDS)
                if watch.why and not told:
                    told = True
                    on_stop()
        finally:
            self._watch = None
        if failures:
            raise failures[0]
