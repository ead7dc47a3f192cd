"""The one policy of memory: what may be planned with, and what its users need. Costs no torch until memory is asked.

A bound that the user gives is taken as it is. Without one, a share of what is free is planned with: estimates of a
network or of a training step are measured per voxel and tight, the optimiser's working grid grows with what there is
and leaves room for other programs.

What a method needs per voxel stands on its card (``bytes_per_voxel``), and what a preset needs in ``presets.json``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..job import InputError

if TYPE_CHECKING:
    import torch

#: Shares of the free memory that are planned with: by the optimiser's grid, a network, a training, all workers of a
#: batch together.
OPTIMISER_SHARE, NETWORK_SHARE, TRAINING_SHARE, BATCH_SHARE = 0.6, 0.8, 0.8, 0.8
#: Bytes per voxel of a network's working grid for the two images and their weights; the network plans its own lattice.
FEEDING_BYTES = 40
#: Bytes per voxel of a dense transform while it is made and written.
DENSE_BYTES = 48
#: Working memory of one worker, 10^9 bytes: torch and the libraries; a network's, rounded up.
WORKER_GB, NETWORK_GB = 0.7, 4.0
#: Bytes per voxel of both scans in a worker.
SCAN_BYTES = 60


def room(device: torch.device | str, memory_gb: float | None, share: float = 1.0) -> float:
    """Bytes that may be used: what the user allows (10^9 bytes), or ``share`` of what is free on the device now."""
    from . import devices

    return memory_gb * 1e9 if memory_gb else share * devices.free_memory(devices.resolve(str(device)))


def check_spacing(spacing: float, voxels: float, bytes_per_voxel: float, available: float) -> None:
    """Refuse a working voxel that was asked for when its grid cannot fit.

    Args:
        spacing: mm. voxels: of its grid.
        bytes_per_voxel: what is needed. available: bytes, from :func:`room`.

    Raises:
        InputError: it does not fit.
    """
    need = voxels * bytes_per_voxel
    if need > available:
        raise InputError(
            f"--spacing {spacing:g} makes {voxels:.3g} voxels, which need about {need / 1e9:.3g} GB; "
            f"{available / 1e9:.3g} GB may be used.",
            "Choose a larger --spacing, or leave it out.",
        )
