"""Method ``similarity``: a rotation, a shift and one scale."""

from ._base import register
from ._linear import Linear
from ._linear import card as _card


@register
class Similarity(Linear):
    """Only the initial alignment, of kind ``similarity``."""

    card = _card("similarity", "Similarity only", "a rotation, a shift and one scale")
