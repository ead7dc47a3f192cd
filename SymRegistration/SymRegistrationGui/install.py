"""Bringing PyTorch and two small packages into Slicer's Python: only on Register, after one question, never at start.

torch comes from the PyTorch extension, which picks the build that fits the graphics card; the rest through
``slicer.packaging`` (Slicer 5.12), or pip on older versions. The application never imports torch itself:
the worker does.
"""

import importlib
import importlib.metadata
import importlib.util
import logging
from dataclasses import dataclass

import slicer
from slicer.i18n import tr as _

TORCH = ">=2.2"
#: The library's other needs; numpy and SimpleITK are part of Slicer and are never touched.
REQUIREMENTS = ("safetensors>=0.4", "psutil>=5.9")


@dataclass
class Missing:
    """What has to be installed.

    Attributes:
        torch: "" = fine, "missing", or "damaged" for one half of an installation.
        packages: requirement lines.
    """

    torch: str
    packages: tuple

    def __bool__(self):
        return bool(self.torch or self.packages)


class InstallError(Exception):
    """Nothing could be installed; ``message`` and ``hint`` say why and what to do."""

    def __init__(self, message, hint):
        super().__init__(message)
        self.message, self.hint = message, hint


def check():
    """What is missing, found from the files on disk in milliseconds; nothing is imported."""
    importlib.invalidate_caches()
    return Missing(_state("torch"), tuple(line for line in REQUIREMENTS if _state(line.split(">")[0])))


def _state(package):
    """ "" = a version is recorded and its code is there; "damaged" = only one of the two; "missing" = neither."""
    try:
        recorded = bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        recorded = False
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    code = spec is not None and spec.origin is not None  # a folder without __init__.py has no origin
    if recorded and code:
        return ""
    return "damaged" if recorded or spec is not None else "missing"


def ensure(client, repair=False, onBegin=lambda text: None):
    """Make everything available, asking once. Call on the main thread, when the user pressed Register.

    An installation takes minutes, during which Slicer processes events: the caller must not let itself be called again.

    Args:
        client: the worker client; it is stopped before files that it may hold open are replaced.
        repair: install again even though everything seems to be there.
        onBegin: called with what to show meanwhile, when the user agreed and the installation begins.

    Returns:
        False when the user declined.

    Raises:
        InstallError: no PyTorch extension, no network, no permission.
    """
    missing = Missing("damaged", REQUIREMENTS) if repair else check()
    if not missing:
        return True
    if not slicer.util.confirmOkCancelDisplay(question(missing), windowTitle=_("Install libraries")):
        return False
    onBegin(
        _("Installing {names}. This can take some minutes; the Python console shows how far it is.").format(
            names=names(missing)
        )
    )
    client.stop()
    if missing.torch:
        _installTorch(missing.torch == "damaged")
    if missing.packages:
        _installPackages(list(missing.packages))
    left = check()
    if left:
        raise InstallError(
            _("The libraries are still incomplete after the installation."),
            _("Restart Slicer and press Register again."),
        )
    return True


def names(missing):
    """What is missing, for people."""
    return ", ".join((["PyTorch"] if missing.torch else []) + [line.split(">")[0] for line in missing.packages])


def question(missing):
    """The one question before anything is downloaded."""
    damaged = (
        _("A former installation of PyTorch is damaged and will be replaced. ") if missing.torch == "damaged" else ""
    )
    size = _("200 MB, with a graphics card up to 3 GB") if missing.torch else _("less than 2 MB")
    return _(
        "{damaged}The registration needs {names}. They are downloaded and installed into Slicer's Python once "
        "({size}); this can take some minutes. Your scans stay on this computer. Install now?"
    ).format(damaged=damaged, names=names(missing), size=size)


def _installTorch(damaged):
    try:
        import PyTorchUtils
    except ImportError:
        raise InstallError(
            _("The extension PyTorch is not installed in Slicer."),
            _("Install it with the Extensions Manager, restart Slicer and press Register again."),
        ) from None
    logic = PyTorchUtils.PyTorchUtilsLogic()
    try:
        if damaged:
            slicer.util.pip_uninstall("torch")
        torch = logic.installTorch(askConfirmation=False, torchVersionRequirement=TORCH)
    except Exception as error:  # pip, network, permissions: all end in the same advice, and the log has the details
        raise _failure("torch", error) from error
    if torch is None:
        raise InstallError(_("PyTorch was not installed."), _("Press Register to try again."))


def _installPackages(packages):
    try:
        packaging = importlib.import_module("slicer.packaging")
    except ImportError:  # Slicer before 5.12
        packaging = None
    try:
        if packaging is not None:
            packaging.pip_ensure(packages, requester="SymRegistration", prompt_install=False, skip_in_testing=False)
        else:
            for package in packages:
                slicer.util.pip_install(package)
    except Exception as error:  # as above
        raise _failure(" ".join(packages), error) from error


def _failure(what, error):
    logging.getLogger("SymRegistration").error("SymRegistration: installing %s failed: %s", what, error)
    return InstallError(
        _("{what} could not be installed ({error}).").format(what=what, error=str(error)[:200]), offlineHint()
    )


def offlineHint():
    """What to copy where on a computer without internet."""
    version = importlib.import_module("sys").version_info
    lines = f'"torch{TORCH}" ' + " ".join(f'"{line}"' for line in REQUIREMENTS)
    return _(
        "Check the internet connection, the proxy and the free disk space, and press Register again. Without internet: "
        "on another computer of the same kind with Python {python}, run  pip download {names} -d wheels  and copy the "
        "folder 'wheels' to this computer; then, in Slicer's Python console, run  slicer.util.pip_install('--no-index "
        "--find-links=PATH/wheels {plain}')  with the path of that folder."
    ).format(python=f"{version.major}.{version.minor}", names=lines, plain="torch safetensors psutil")
