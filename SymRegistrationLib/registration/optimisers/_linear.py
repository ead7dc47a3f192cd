"""Methods that only place and scale: the initial alignment is their whole result, and nothing bends."""

from __future__ import annotations

import torch

from ...fields import FieldPair
from ..working_grid import WorkingPair
from ._base import Optimiser, OptimiserCard, RunSettings

PUBLICATION = (
    "Jenkinson and Smith, A global optimisation method for robust affine registration of brain images, Medical Image "
    "Analysis 5:143-156 (2001), doi:10.1016/S1361-8415(01)00036-6"
)


def card(pose: str, label: str, freedom: str) -> OptimiserCard:
    """The card of a linear method whose alignment is of kind ``pose``."""
    return OptimiserCard(
        name=pose,
        label=label,
        title=f"{freedom}; nothing bends",
        description=f"Finds {freedom}, wherever the scans lie in space, and stops there. Both directions are linear "
        "transforms and exact inverses of each other.",
        publication=PUBLICATION,
        deviations=(
            "the search is our own: even rotations, all shifts by Fourier correlation, then gradients in a space "
            "half-way between the scans",
        ),
        inverse_method="symmetric",
        similarities=("ncc", "mi"),
        bytes_per_voxel=100.0,
        pose=pose,
    )


class Linear(Optimiser):
    """What the linear methods share: no displacement at all."""

    def run(self, space: WorkingPair, settings: RunSettings) -> FieldPair:
        """Zero fields in both directions; see :meth:`Optimiser.run`."""
        none = torch.zeros(1, 3, *space.grid.shape, device=space.fixed.device)
        settings.progress("optimise", 1.0, "nothing bends")
        return FieldPair(none, none, "symmetric", 0.0, {"halves": torch.cat([none, none])})
