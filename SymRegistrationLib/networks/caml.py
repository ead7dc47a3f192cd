"""CAML: a cascade of windowed cross-attention over multiple layers, with residual-block skips.

Paper: "cross-attention over multiple layers (CAML), residual-block skip connections (RBSC) and a cascade with attention
and residual skips (CARSC)", Intelligent Data Analysis, DOI 10.3233/IDA-230692. Its available text lost nearly all
formulas and numbers; XMorpher (Shi et al., MICCAI 2022), its stated foundation, fills what it can. Written from both;
no code was copied.

Two streams, moving and fixed, share an encoder-decoder at 1/4 to 1/32. Every block lets base windows (2^3 tokens) of
one stream attend to search windows (6^3) of the other, both updates from the old values, with the same weights.

What is read into, or differs from, the paper and its base:

* CAML: a block also attends, with the same weights, to the other stream's finer encoder levels, max-pooled to its size
  (``caml_span`` of them; 0 = XMorpher); the results enter through learned scalars that start at 0.
* RBSC: every skip passes a residual block (two conv-InstanceNorm), shared by both streams, before it is joined.
* CARSC: the second pass sees the moving image warped by the first; the first pass's decoder features at 1/4 to 1/16
  enter the second's encoder through a residual block and a sigmoid gate, without gradient, the moving stream's warped
  by the first field. Maps are composed and the original is warped once. Weights are shared by both passes (``share``).
* XMorpher's faults are repaired: all 27 neighbours, any batch size, both streams normalised, moving and fixed in their
  order, tokens outside the volume masked, sampling with aligned corners, no dead layer; a relative position bias is
  added (``bias``); no drop path.
* ``tail="transposed"`` is XMorpher's end (full resolution from one transposed convolution, size ``published``);
  ``"smooth"`` (size ``small``) predicts at 1/4 and 1/2 from the streams' difference and sum, with the images' 2^3
  blocks as a skip.
* No inverse is defined. Both directions run (the first pass's features serve both), and the two maps are made inverse
  to each other (``inverse="balanced"``: each becomes the mean of itself and the other's fixed-point inverse);
  ``"fixed_point"`` inverts one run, ``"swapped"`` returns both as they are. ``svf=True`` reads the result of each pass
  as a velocity at half resolution (7 squarings); the inverse then is exp(-v) of one run.
* Training treats both directions (``symmetric``) and adds the mean squared composition, weight 0.01 (``consistency``);
  0 and ``symmetric=False`` are the paper's.
* With ``passes`` the cascade becomes that number of passes with the same weights in the mean frame of both scans
  (``_passes``), without hand-over of features: half of the mean of both directions' fields goes to each side. With
  ``force`` the smooth tail sees the gradient of the local correlation as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fields import compose, exponentiate, warp
from ..losses import diffusion, lncc
from ._attention import finished_pair, up_blocks
from ._base import Card, NetworkOutput, Recipe, Stage, SymmetricNetwork, differences, measured_pair, register
from ._blocks import Conv3d
from ._caml_blocks import CrossStage, Down, HandOver, Residual, SmoothTail, TransposedTail, Up, first, last
from ._passes import HalfFields, MeanFramePasses, passed_output
from ._switches import REPEATED, Repeated, check_choice, check_choices

_SMALL = {"dims": (32, 64, 96, 128), "depths": (1, 2, 2, 2), "tail": "smooth"}
_CARD = Card(
    name="caml",
    label="CAML",
    description="A cross-attention network that estimates both directions from coarse to fine.",
    title="CAML cascade: windowed cross-attention over several layers, residual skips, two passes",
    publication="Cross-attention over multiple layers with residual-block skips and cascade for brain MRI "
    "registration, Intelligent Data Analysis, DOI 10.3233/IDA-230692, on XMorpher (Shi et al., MICCAI 2022)",
    inverse_method="fixed_point",
    deviations=differences(__doc__),
    size_multiple=4,
    minimum_size=40,
    bytes_per_voxel={"published": 550.0, "small": 240.0, "recurrent": 620.0},
    sizes={
        "published": {},
        "small": _SMALL,
        "recurrent": {**_SMALL, "dims": (24, 48, 64, 96), "carsc": 1, **REPEATED},
    },
)


@dataclass(frozen=True)
class _Switches(Repeated):
    """Arguments of :class:`CAML`.

    Attributes:
        dims: channels at 1/4, 1/8, ... of the input; heads have 16 channels each.
        depths: blocks per stage, in encoder and decoder.
        caml_span: number of finer levels that a block attends to besides its own.
        rbsc: residual blocks in the skips.
        carsc: passes of the cascade.
        share: one set of weights for all passes.
        svf: velocities instead of displacements.
        tail: ``transposed`` (XMorpher) or ``smooth``.
        bias: relative position bias.
        inverse: ``balanced``, ``fixed_point`` or ``swapped``; without effect on ``svf``.
        smooth: weight of the diffusion.
        symmetric: train both directions.
        consistency: weight of the mean squared composition, voxel^2.
        passes: of the whole network in the place of the cascade; need ``carsc`` 1 and ``tail`` smooth. force: seen by
            the tail.
    """

    dims: Sequence[int] = (48, 96, 192, 384)
    depths: Sequence[int] = (2, 2, 6, 2)
    caml_span: int = 1
    rbsc: bool = True
    carsc: int = 2
    share: bool = True
    svf: bool = False
    tail: str = "transposed"
    bias: bool = True
    inverse: str = "balanced"
    smooth: float = 1.0
    symmetric: bool = True
    consistency: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.passes:
            check_choices(self, carsc=(1,), tail=("smooth",), svf=(False,))
        check_choices(
            self,
            caml_span=range(len(self.dims)),
            carsc=(1, 2, 3),
            tail=("transposed", "smooth"),
            inverse=("balanced", "fixed_point", "swapped"),
        )
        check_choice("number of depths", len(self.depths), (len(self.dims),))


# ---------------------------------------------------------------------------------------------- one pass


class _Pass(nn.Module):
    """Encoder and decoder of one pass over both streams, and the end that makes a field of them."""

    def __init__(self, s: _Switches, later: bool):
        super().__init__()
        dims, depth = list(s.dims), len(s.dims)
        self.embed = Conv3d(1, dims[0], 4, stride=4)
        finer = [dims[max(i - s.caml_span, 0) : i][::-1] for i in range(depth)]
        self.encode = nn.ModuleList(CrossStage(c, n, f, s.bias) for c, n, f in zip(dims, s.depths, finer))
        self.decode = nn.ModuleList(CrossStage(c, n, f, s.bias) for c, n, f in zip(dims, s.depths, finer))
        self.down = nn.ModuleList(Down(a, b) for a, b in zip(dims, dims[1:]))
        self.up = nn.ModuleList(Up(b, a) for a, b in zip(dims, dims[1:]))
        self.norm = nn.LayerNorm(dims[-1])
        self.skip = nn.ModuleList(Residual(c) if s.rbsc else nn.Identity() for c in dims[:-1])
        self.join = nn.ModuleList(nn.Linear(2 * c, c) for c in dims[:-1])
        self.carry = nn.ModuleList(HandOver(c) for c in dims[:-1]) if later else None
        self.tail = TransposedTail(dims[0]) if s.tail == "transposed" else SmoothTail(dims[0], s.force)
        self.span = s.caml_span

    def _finer(self, maps: list[tuple[Tensor, Tensor]], level: int) -> tuple[list[Tensor], list[Tensor]]:
        """Both streams' encoder maps of the levels before ``level``, nearest first."""
        found = maps[max(level - self.span, 0) : level][::-1]
        return [m for m, _ in found], [f for _, f in found]

    def forward(
        self, moving: Tensor, fixed: Tensor, carried: list[tuple[Tensor, Tensor]] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Decoder maps (moving stream, fixed stream) at 1/4, 1/8, ...; ``carried``: those of the pass before."""
        m, f = last(self.embed(moving)), last(self.embed(fixed))
        maps: list[tuple[Tensor, Tensor]] = []
        for level, stage in enumerate(self.encode):
            m, f = stage(m, f, self._finer(maps, level))
            if carried is not None and level < len(self.carry):
                m, f = (x + self.carry[level](c) for x, c in zip((m, f), carried[level]))
            maps.append((m, f))
            if level < len(self.down):
                m, f = self.down[level](m), self.down[level](f)
        m, f = self.norm(m), self.norm(f)
        found: list[tuple[Tensor, Tensor]] = []
        for level in reversed(range(len(self.decode))):
            if level < len(self.up):
                m, f = (
                    self.join[level](torch.cat([self.up[level](x, like=e), self.skip[level](e)], -1))
                    for x, e in zip((m, f), maps[level])
                )
            m, f = self.decode[level](m, f, self._finer(maps, level))
            found.append((m, f))
        return found[::-1]


@dataclass(frozen=True, eq=False)
class _Way:
    """One direction so far: the composed map, its exact inverse if there is one, the map after every pass; cells."""

    field: Tensor
    inverse: Tensor | None
    passes: list[Tensor]


@register
class CAML(MeanFramePasses, SymmetricNetwork):
    """The cascade. See the file's docstring; arguments: :class:`_Switches`."""

    card = _CARD
    recipe = Recipe((Stage(1, 100_000, 1e-4),), batch=1, notes="affinely aligned pairs; the paper's counts are lost")

    def __init__(self, **switches) -> None:
        super().__init__()
        s = self.switches = _Switches(**switches)
        count = 1 if s.share else s.carsc
        self.passes = nn.ModuleList(_Pass(s, later=s.carsc > 1 and (s.share or index > 0)) for index in range(count))
        #: lattice of the fields that passes are composed on
        self.scale = 2 if s.svf else self.passes[0].tail.scale

    # ------------------------------------------------------------------------------------------ fields

    def _step(
        self, net: _Pass, maps: tuple[Tensor, Tensor], images: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """(increment, its inverse if it is a velocity's) of one pass, on the lattice of ``scale``."""
        u = net.tail(*maps, *images)
        if not self.switches.svf:
            return u, None
        v = u if net.tail.scale == 2 else 0.5 * F.avg_pool3d(u, 2)
        return exponentiate(v), exponentiate(-v)

    def _advance(self, way: _Way | None, step: tuple[Tensor, Tensor | None]) -> _Way:
        u, inverse = step
        if way is not None:
            inverse = None if inverse is None else compose(inverse, way.inverse)
            u = compose(way.field, u)
        return _Way(u, inverse, [*([] if way is None else way.passes), u])

    def ways(self, moving: Tensor, fixed: Tensor, both: bool = True) -> list[_Way]:
        """moving -> fixed and, when ``both``, fixed -> moving, through all passes."""
        first = self.passes[0]
        maps = first(moving, fixed)
        starts = [(moving, fixed, maps)]
        if both:  # the streams are alike, so the first pass's features serve the other direction, too
            starts.append((fixed, moving, [(f, m) for m, f in maps]))
        return [self._cascade(*start) for start in starts]

    def _cascade(self, moving: Tensor, fixed: Tensor, maps: list[tuple[Tensor, Tensor]]) -> _Way:
        step = self._step(self.passes[0], maps[0], (moving, fixed))
        way = self._advance(None, step)
        for index in range(1, self.switches.carsc):
            net = self.passes[0 if self.switches.share else index]
            images = (warp(moving, up_blocks(way.field, self.scale)), fixed)
            maps = net(*images, self._carried(maps, step[0]))
            step = self._step(net, maps[0], images)
            way = self._advance(way, step)
        return way

    def _carried(self, maps: list[tuple[Tensor, Tensor]], step: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The maps of the pass before without gradient, the moving stream's warped by ``step``, what
        that pass added."""
        carried = []
        for level, (m, f) in enumerate(maps[:-1]):
            factor = 4 * 2**level // self.scale
            u = F.avg_pool3d(step.detach(), factor, ceil_mode=True, count_include_pad=False) / factor
            carried.append((last(warp(first(m.detach()).float(), u)).to(m.dtype), f.detach()))
        return carried

    def forward(self, moving: Tensor, fixed: Tensor) -> NetworkOutput:
        """Both directions; ``aux["passes"]``: the map moving -> fixed after each pass, on the cells of ``scale``."""
        self.check_inputs(moving, fixed)
        s = self.switches
        if s.passes:
            return passed_output(self, moving, fixed)
        found = self.ways(moving, fixed, both=not s.svf and s.inverse != "fixed_point")
        aux: dict[str, Any] = {"passes": found[0].passes}
        if s.svf:
            pair = measured_pair(*(up_blocks(u, self.scale) for u in (found[0].field, found[0].inverse)), "svf")
        else:
            pair = finished_pair(found[0].field, found[-1].field, s.inverse, self.scale)
        return NetworkOutput(pair, aux=aux)

    def step(self, moving: Tensor, fixed: Tensor, state: HalfFields, force: Tensor | None, both: bool) -> Tensor:
        net = self.passes[0]
        m, f = net(moving, fixed)[0]
        u = net.tail(m, f, moving, fixed, force)
        return (u - net.tail(f, m, fixed, moving, None if force is None else -force)) / 4 if both else u / 2

    # ------------------------------------------------------------------------------------------ training

    def objective(self, moving: Tensor, fixed: Tensor, level: int | None = None) -> dict[str, Tensor]:
        s = self.switches
        found = self.ways(moving, fixed, both=s.symmetric)
        terms: dict[str, list[Tensor]] = {"similarity": [], "smooth": []}
        for way, a, b in zip(found, (moving, fixed), (fixed, moving)):
            total = {"similarity": 0, "smooth": 0}
            for index, u in enumerate(way.passes):
                weight = 1.0 if index == len(way.passes) - 1 else 0.5
                full = up_blocks(u, self.scale)
                total["similarity"] = total["similarity"] + weight * lncc(warp(a, full), b, 9)
                total["smooth"] = total["smooth"] + weight * s.smooth * diffusion(full)
            for name, value in total.items():
                terms[name].append(value)
        if s.symmetric and s.consistency:
            u, w = (way.field for way in found)
            terms["consistency"] = [
                s.consistency * self.scale**2 * c.square().sum(1).mean() for c in (compose(u, w), compose(w, u))
            ]
        return {name: sum(parts) / len(parts) for name, parts in terms.items()}

    def mappings(
        self, moving: Tensor, fixed: Tensor, level: int | None = None
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        there, *back = (
            up_blocks(way.field, self.scale) for way in self.ways(moving, fixed, both=self.switches.symmetric)
        )
        return [(there, None), *((None, u) for u in back)]

    def parameter_groups(self, level: int) -> list[nn.Parameter]:
        """One stage: everything."""
        return list(self.parameters())
