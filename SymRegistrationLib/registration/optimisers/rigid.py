"""Method ``rigid``: a rotation and a shift."""

from ._base import register
from ._linear import Linear
from ._linear import card as _card


@register
class Rigid(Linear):
    """Only the initial alignment, of kind ``rigid``."""

    card = _card("rigid", "Rigid only", "a rotation and a shift")
