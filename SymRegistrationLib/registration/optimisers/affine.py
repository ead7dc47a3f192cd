"""Method ``affine``: a rotation, a shift, scales and shears."""

from ._base import register
from ._linear import Linear
from ._linear import card as _card


@register
class Affine(Linear):
    """Only the initial alignment, of kind ``affine``."""

    card = _card("affine", "Affine only", "a rotation, a shift, scales and shears")
