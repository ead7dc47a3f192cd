"""When things happen: not inside the event that asks for them; and no unexpected error that only the console tells."""

import functools

import qt
import slicer
from slicer.i18n import tr as _


def later(function):
    """Call ``function`` once the event that is being handled is over.

    A message box runs an event loop of its own. Opened while a scene closes or a node goes, it would let clicks and
    timers meet a half-closed scene. Without an event loop (a script, a test) nothing would come back to the call, so it
    is made at once.
    """
    if _inEventLoop():
        qt.QTimer.singleShot(0, function)
    else:
        function()


def _inEventLoop():
    try:
        return qt.QThread.currentThread().loopLevel() > 0
    except AttributeError:  # a Python binding without it; the application always runs a loop
        return True


def guarded(function):
    """A slot for ``function`` that shows an unexpected exception to the user and then lets the console have it."""

    @functools.wraps(function)
    def slot(*arguments):
        with slicer.util.tryWithErrorDisplay(
            _("SymRegistration met an unexpected error. Please report it with the log.")
        ):
            return function(*arguments)

    return slot
