"""The same pairs on a Dask cluster: each Dask worker keeps one warm ``symreg worker`` process and hands it its pairs.

The files must have the same paths on every machine. A Dask worker that dies takes its child with it, and the
scheduler gives the pair to another one; a child that dies or hangs is replaced as on one machine.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, LifoQueue
from typing import Any

from .. import __version__
from ..job import InputError, RegistrationError
from .pair import PairRequest
from .workers import ATTEMPTS, Event, WorkerLost, WorkerProcess, WorkersBroken

#: Children of this (Dask worker) process that wait for a pair.
_IDLE: LifoQueue[WorkerProcess] = LifoQueue()
#: Seconds to wait for the scheduler to answer.
CONNECT_SECONDS = 30


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """A client of the cluster at ``address``.

    Raises:
        InputError: dask.distributed is not installed here, or nobody answers.
        RegistrationError: the cluster went away meanwhile.
    """
    try:
        from distributed import Client
    except ImportError:
        raise InputError(
            "--scheduler needs dask.distributed.", "pip install 'symregistration[cluster]', here and on the workers."
        ) from None
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise InputError(
            f"no Dask scheduler answers at '{address}' ({str(error)[:120] or type(error).__name__}).",
            "Give what dask-scheduler prints, such as tcp://node7:8786.",
        ) from None
    try:
        yield client
    except OSError as error:
        raise RegistrationError(
            f"the connection to the cluster at '{address}' was lost ({error}).",
            "Finished pairs are kept; start the same batch again.",
        ) from None
    finally:
        with contextlib.suppress(OSError, TimeoutError, RuntimeError):
            client.close(timeout=5)


def run_on_cluster(
    client: Any, requests: Sequence[PairRequest], worker_timeout_s: float, tell: Callable[[Event], None]
) -> None:
    """Do every request through a client from :func:`connected`; ``tell`` is called in this thread."""
    from distributed import as_completed

    started = time.monotonic()
    futures = {
        client.submit(pair_on_worker, request.to_dict(), worker_timeout_s, __version__, pure=False): index
        for index, request in enumerate(requests)
    }
    for future in as_completed(list(futures), loop=client.loop):
        tell(_event(future, futures[future], time.monotonic() - started))
        future.release()


def _event(future: Any, index: int, seconds: float) -> Event:
    error = future.exception() if future.status == "error" else None
    if future.status not in ("finished", "error"):  # cancelled or lost
        return Event("failed", index, "the cluster dropped this pair.", seconds=seconds)
    if error is not None:  # a Dask worker that died too often with this pair, or could not take it up
        died = type(error).__name__ == "KilledWorker"
        what = "its Dask workers died, again and again" if died else f"{type(error).__name__}: {str(error)[:300]}"
        return Event("failed", index, f"{what}.", seconds=seconds)
    answer = future.result()
    if "error" in answer:
        return Event("failed", index, answer["error"], seconds=answer["seconds"], attempts=answer["attempts"])
    return Event("done", index, metrics=answer["metrics"], seconds=answer["seconds"], attempts=answer["attempts"])


def pair_on_worker(raw: dict[str, Any], worker_timeout_s: float, version: str) -> dict[str, Any]:
    """What runs on the Dask worker: plain data in and out.

    Returns:
        ``metrics`` or ``error`` (a sentence), ``seconds`` and ``attempts``.
    """
    if version != __version__:
        return {
            "error": f"the Dask worker has SymRegistration {__version__}, the batch {version}.",
            "seconds": 0.0,
            "attempts": 1,
        }
    reason = ""
    for attempt in range(1, ATTEMPTS + 1):
        started = time.monotonic()
        child = None
        try:
            child = _child()
            metrics = child.ask("pair", {"pair": raw}, worker_timeout_s)
            return _answer(child, started, attempt, metrics=metrics)
        except WorkersBroken as error:
            reason = str(error)
        except WorkerLost as lost:
            reason = f"{lost}, {ATTEMPTS} times."
        except RegistrationError as error:
            return _answer(child, started, attempt, error=str(error))
        if child is not None:
            child.kill()
    return {"error": reason, "seconds": time.monotonic() - started, "attempts": ATTEMPTS}


def _child() -> WorkerProcess:
    with contextlib.suppress(Empty):
        return _IDLE.get_nowait()
    child = WorkerProcess()
    try:
        child.ready()
    except (WorkerLost, WorkersBroken):
        child.kill()
        raise
    return child


def _answer(child: WorkerProcess, started: float, attempt: int, **content: Any) -> dict[str, Any]:
    _IDLE.put(child)
    return {**content, "seconds": time.monotonic() - started, "attempts": attempt}
