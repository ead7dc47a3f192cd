"""What is the user's and not the scene's: kept in Slicer's own settings."""

import slicer

IDLE_KEY = "SymRegistration/WorkerIdleMinutes"
#: Minutes; after so long without work the registration process ends and gives its memory back.
IDLE_DEFAULT = 10


def idleMinutes():
    """Whole minutes; 0 = the process stays until Slicer ends. What is not a number counts as the default."""
    try:
        return max(
            0, slicer.util.settingsValue(IDLE_KEY, IDLE_DEFAULT, converter=int, settings=slicer.app.userSettings())
        )
    except (TypeError, ValueError):
        return IDLE_DEFAULT


def setIdleMinutes(minutes):
    slicer.app.userSettings().setValue(IDLE_KEY, int(minutes))
