"""Work on the application's thread, cut into slices so short that nobody notices.

Reading Slicer's arrays, writing files and filling nodes has to happen on the main thread. Such work is written as a
generator that yields between pieces of a few milliseconds; its return value is the result.
"""

import time

import qt

#: Seconds of work before the event loop gets its turn again.
BUDGET = 0.012
#: What a generator yields when it has nothing to do until :meth:`StepRunner.resume`.
PAUSE = object()
#: Bytes that one piece of copying handles: a few milliseconds.
PIECE = 4 << 20


class StepRunner:
    """Runs one generator at a time from a timer."""

    def __init__(self):
        self._timer = qt.QTimer()
        self._timer.interval = 0
        self._timer.timeout.connect(self._tick)
        self._steps = None
        self._paused = False
        self._onDone = None
        self._onError = None

    @property
    def busy(self):
        return self._steps is not None

    def start(self, steps, onDone, onError):
        """Run ``steps``; then ``onDone(return value)``, or ``onError(exception)``."""
        if self.busy:
            raise RuntimeError("another piece of work is still under way")
        self._steps, self._onDone, self._onError = steps, onDone, onError
        self._timer.start()

    def resume(self):
        """Go on after a pause, at once; without one, nothing happens."""
        if self._paused:
            self._paused = False
            self._timer.start()
            self._tick()

    def cancel(self):
        """Stop where it is; neither call-back is called."""
        self._timer.stop()
        self._paused = False
        steps, self._steps = self._steps, None
        if steps is not None:
            steps.close()

    def _tick(self):
        deadline = time.perf_counter() + BUDGET
        try:
            while time.perf_counter() < deadline:
                if next(self._steps) is PAUSE:
                    self._paused = True
                    self._timer.stop()
                    return
        except StopIteration as stop:
            self._finish(self._onDone, stop.value)
        except Exception as error:  # handed on: the caller tells the user
            self._finish(self._onError, error)

    def _finish(self, callback, value):
        self._timer.stop()
        self._steps = None
        callback(value)


def complete(steps):
    """Run ``steps`` to the end at once; returns its value."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def pieces(count, bytesEach):
    """(start, stop) ranges over ``count`` items of ``bytesEach`` bytes, each about PIECE bytes."""
    step = max(1, PIECE // max(1, bytesEach))
    for start in range(0, count, step):
        yield start, min(count, start + step)
