"""CAML: a cascade of windowed cross-attention over multiple layers, with residual-block skips.

Long because one method is one file.

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
from ._attention import finished_pair, key_offsets, up_blocks, window_attention
from ._base import (
    Card,
    NetworkOutput,
    Recipe,
    Stage,
    SymmetricNetwork,
    check_choice,
    measured_pair,
    register,
    zero_init,
)
from ._blocks import Conv3d, space_to_depth
from ._passes import HalfFields, MeanFramePasses, begin_as_step, check_passes, passed_output

_CARD = Card(
    name="caml",
    label="CAML",
    description="A cross-attention network that estimates both directions from coarse to fine.",
    title="CAML cascade: windowed cross-attention over several layers, residual skips, two passes",
    publication="Cross-attention over multiple layers with residual-block skips and cascade for brain MRI "
    "registration, Intelligent Data Analysis, DOI 10.3233/IDA-230692, on XMorpher (Shi et al., MICCAI 2022)",
    inverse_method="fixed_point",
    deviations=(
        "The paper's text is damaged; layer pairs, gates, residual blocks and hand-over are this implementation's "
        "reading.",
        "XMorpher's faults are repaired, tokens outside the volume are masked, a relative position bias is added.",
        "Max-pooled finer levels enter through scalars that start at 0; no drop path.",
        "The hand-over to the second pass is detached, and the moving stream's is warped by the first field.",
        "Both directions run and are made inverse by averaging with fixed-point inverses; svf=True gives exp(-v).",
        "Training uses both directions and a small inverse-consistency term.",
        "Size small predicts at 1/4 and 1/2 instead of through a transposed convolution.",
        "With passes=K the cascade is K passes with shared weights in the mean frame of both scans, without "
        "hand-over; with force=true its end sees the normalised gradient of the local correlation as well.",
    ),
    size_multiple=4,
    minimum_size=40,
    bytes_per_voxel={"published": 550.0, "small": 240.0, "recurrent": 520.0},
    sizes={
        "published": {},
        "small": {"dims": (32, 64, 96, 128), "depths": (1, 2, 2, 2), "tail": "smooth"},
        "recurrent": {
            "dims": (24, 48, 64, 96),
            "depths": (1, 2, 2, 2),
            "tail": "smooth",
            "carsc": 1,
            "passes": 4,
            "force": True,
        },
    },
)

_WINDOW = 2


@dataclass(frozen=True)
class _Switches:
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
        passes: how often the network looks at use, in the mean frame; 0 = the paper's cascade. Needs ``carsc`` 1 and
            ``tail`` smooth.
        force: the tail sees the gradient of the local correlation, too; needs ``passes``.
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
    passes: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        check_passes(self.passes, self.force)
        if self.passes:
            check_choice("carsc with passes", self.carsc, (1,))
            check_choice("tail with passes", self.tail, ("smooth",))
            check_choice("svf with passes", self.svf, (False,))
        check_choice("caml_span", self.caml_span, range(len(self.dims)))
        check_choice("carsc", self.carsc, (1, 2, 3))
        check_choice("tail", self.tail, ("transposed", "smooth"))
        check_choice("inverse", self.inverse, ("balanced", "fixed_point", "swapped"))
        check_choice("number of depths", len(self.depths), (len(self.dims),))


# ---------------------------------------------------------------------------------------------- blocks


def _last(x: Tensor) -> Tensor:
    """Channels last."""
    return x.permute(0, 2, 3, 4, 1)


def _first(x: Tensor) -> Tensor:
    """Channels first."""
    return x.permute(0, 4, 1, 2, 3)


class CrossBlock(nn.Module):
    """Windowed cross-attention from a base to search maps, then an MLP (CAT); maps are (N, D, H, W, C)."""

    def __init__(self, c: int, bias: bool = True):
        super().__init__()
        self.heads = max(c // 16, 1)
        self.norm, self.norm_mlp = nn.LayerNorm(c), nn.LayerNorm(c)
        self.query, self.key_value, self.out = nn.Linear(c, c), nn.Linear(c, 2 * c), nn.Linear(c, c)
        self.mlp = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))
        reach = 4 * _WINDOW - 1
        self.table = nn.Parameter(0.02 * torch.randn(self.heads, reach**3)) if bias else None
        offsets = key_offsets(_WINDOW) + 2 * _WINDOW - 1
        index = (offsets * torch.tensor([reach**2, reach, 1])).sum(-1)
        self.register_buffer("index", index, persistent=False)

    def attend(self, base: Tensor, search: Tensor) -> Tensor:
        """What ``base`` gathers from ``search``, before the residual; both of one size."""
        k, v = self.key_value(self.norm(search)).chunk(2, -1)
        bias = None if self.table is None else self.table[:, self.index]
        return self.out(window_attention(self.query(self.norm(base)), k, v, self.heads, _WINDOW, bias))

    def forward(self, base: Tensor, searches: Sequence[Tensor], gates: Sequence[Tensor]) -> Tensor:
        """``searches[0]`` counts fully, the others times their gate."""
        total = base + self.attend(base, searches[0])
        for gate, search in zip(gates, searches[1:]):
            total = total + gate * self.attend(base, search)
        return total + self.mlp(self.norm_mlp(total))


class _Stage(nn.Module):
    """Blocks of one scale for both streams; ``finer`` are the channels of the finer levels attended
    to, nearest first."""

    def __init__(self, c: int, depth: int, finer: Sequence[int], bias: bool):
        super().__init__()
        self.blocks = nn.ModuleList(CrossBlock(c, bias) for _ in range(depth))
        self.lift = nn.ModuleList(nn.Sequential(nn.LayerNorm(f), nn.Linear(f, c)) for f in finer)
        self.gates = nn.Parameter(torch.zeros(depth, len(finer))) if finer else None

    def forward(self, m: Tensor, f: Tensor, finer: tuple[list[Tensor], list[Tensor]]) -> tuple[Tensor, Tensor]:
        extra_m, extra_f = ([lift(self._pooled(x, m)) for lift, x in zip(self.lift, maps)] for maps in finer)
        for index, block in enumerate(self.blocks):
            gates = [] if self.gates is None else list(self.gates[index])
            m, f = block(m, [f, *extra_f], gates), block(f, [m, *extra_m], gates)
        return m, f

    @staticmethod
    def _pooled(x: Tensor, like: Tensor) -> Tensor:
        x = _first(x)
        while x.shape[2] > like.shape[1] or x.shape[3] > like.shape[2] or x.shape[4] > like.shape[3]:
            x = F.max_pool3d(x, 2, ceil_mode=True)
        return _last(x)


class _Down(nn.Module):
    """Half the size, rounded up, and other channels."""

    def __init__(self, a: int, b: int):
        super().__init__()
        self.conv, self.norm = Conv3d(a, b, 2, stride=2), nn.LayerNorm(b)

    def forward(self, x: Tensor) -> Tensor:
        pad = [0, 0]
        for n in reversed(x.shape[1:4]):
            pad += [0, n % 2]
        return self.norm(_last(self.conv(_first(F.pad(x, pad)))))


class _Up(nn.Module):
    """Twice the size, cut to that of ``like``."""

    def __init__(self, a: int, b: int):
        super().__init__()
        self.conv, self.norm = nn.ConvTranspose3d(a, b, 2, stride=2), nn.LayerNorm(b)

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        d, h, w = like.shape[1:4]
        return self.norm(_last(self.conv(_first(x)))[:, :d, :h, :w])


class _Residual(nn.Module):
    """conv-InstanceNorm-LeakyReLU-conv-InstanceNorm, plus identity, LeakyReLU; (N, D, H, W, C)."""

    def __init__(self, c: int):
        super().__init__()
        self.body = nn.Sequential(
            Conv3d(c, c, 3, padding=1, bias=False),
            nn.InstanceNorm3d(c, affine=True),
            nn.LeakyReLU(0.2),
            Conv3d(c, c, 3, padding=1, bias=False),
            nn.InstanceNorm3d(c, affine=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = _first(x)
        return _last(F.leaky_relu(x + self.body(x), 0.2))


class _HandOver(nn.Module):
    """The cascade's attention: a residual block times one sigmoid weight per token."""

    def __init__(self, c: int):
        super().__init__()
        self.body, self.weight = _Residual(c), nn.Linear(c, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x * self.weight(x).sigmoid()


class _TransposedTail(nn.Module):
    """XMorpher's end: full resolution from one transposed convolution. ``scale`` is the lattice of the result."""

    scale = 1

    def __init__(self, c: int):
        super().__init__()
        self.norm, self.grow = nn.LayerNorm(2 * c), nn.ConvTranspose3d(2 * c, c // 2, 4, stride=4)
        self.head = zero_init(Conv3d(c // 2, 3, 3, padding=1))

    def forward(self, m: Tensor, f: Tensor, moving: Tensor, fixed: Tensor, force: Tensor | None = None) -> Tensor:
        return self.head(self.grow(_first(self.norm(torch.cat([m, f], -1))))).float()


class _SmoothTail(nn.Module):
    """A field at 1/4 plus one at 1/2, where the images' own blocks join in."""

    scale = 2

    def __init__(self, c: int, force: bool = False):
        super().__init__()
        self.force = force
        self.contrast, self.norm = nn.LayerNorm(c), nn.LayerNorm(c)
        self.mixed = Conv3d(2 * c, c, 3, padding=1)
        self.coarse = zero_init(Conv3d(c, 3, 3, padding=1))
        self.skip = Conv3d(19 if force else 16, 16, 3, padding=1)
        self.joined = Conv3d(c + 16, 16, 3, padding=1)
        self.head = zero_init(Conv3d(16, 3, 3, padding=1))
        if force:
            begin_as_step([self.skip, self.joined, self.head], 16, [c, 0], 0.5)  # half of it goes to each side

    def forward(self, m: Tensor, f: Tensor, moving: Tensor, fixed: Tensor, force: Tensor | None = None) -> Tensor:
        x = torch.cat([self.contrast(m - f), self.norm(m + f)], -1)
        x = F.leaky_relu(self.mixed(_first(x)), 0.2)
        blocks = space_to_depth(torch.cat([moving, fixed], 1))
        if self.force:
            blocks = torch.cat([blocks, torch.zeros_like(blocks[:, :3]) if force is None else force], 1)
        blocks = F.leaky_relu(self.skip(blocks), 0.2)
        fine = F.interpolate(x, scale_factor=2.0, mode="trilinear", align_corners=False)
        fine = F.leaky_relu(self.joined(torch.cat([fine, blocks], 1)), 0.2)
        return up_blocks(self.coarse(x).float(), 2) + self.head(fine).float()


# ---------------------------------------------------------------------------------------------- one pass


class _Pass(nn.Module):
    """Encoder and decoder of one pass over both streams, and the end that makes a field of them."""

    def __init__(self, s: _Switches, later: bool):
        super().__init__()
        dims, depth = list(s.dims), len(s.dims)
        self.embed = Conv3d(1, dims[0], 4, stride=4)
        finer = [dims[max(i - s.caml_span, 0) : i][::-1] for i in range(depth)]
        self.encode = nn.ModuleList(_Stage(c, n, f, s.bias) for c, n, f in zip(dims, s.depths, finer))
        self.decode = nn.ModuleList(_Stage(c, n, f, s.bias) for c, n, f in zip(dims, s.depths, finer))
        self.down = nn.ModuleList(_Down(a, b) for a, b in zip(dims, dims[1:]))
        self.up = nn.ModuleList(_Up(b, a) for a, b in zip(dims, dims[1:]))
        self.norm = nn.LayerNorm(dims[-1])
        self.skip = nn.ModuleList(_Residual(c) if s.rbsc else nn.Identity() for c in dims[:-1])
        self.join = nn.ModuleList(nn.Linear(2 * c, c) for c in dims[:-1])
        self.carry = nn.ModuleList(_HandOver(c) for c in dims[:-1]) if later else None
        self.tail = _TransposedTail(dims[0]) if s.tail == "transposed" else _SmoothTail(dims[0], s.force)
        self.span = s.caml_span

    def _finer(self, maps: list[tuple[Tensor, Tensor]], level: int) -> tuple[list[Tensor], list[Tensor]]:
        """Both streams' encoder maps of the levels before ``level``, nearest first."""
        found = maps[max(level - self.span, 0) : level][::-1]
        return [m for m, _ in found], [f for _, f in found]

    def forward(
        self, moving: Tensor, fixed: Tensor, carried: list[tuple[Tensor, Tensor]] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Decoder maps (moving stream, fixed stream) at 1/4, 1/8, ...; ``carried``: those of the pass before."""
        m, f = _last(self.embed(moving)), _last(self.embed(fixed))
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
            carried.append((_last(warp(_first(m.detach()).float(), u)).to(m.dtype), f.detach()))
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
