"""HSyN: two half-way displacement fields from a three-level pyramid, and a network that inverts them.

Paper: Q. Sha, K. Sun, M. Xu, Y. Li, Z. Xue, X. Cao, D. Shen, "Hierarchical Symmetric Normalization Registration
using Deformation-Inverse Network", MICCAI 2024 (open access). Written from the paper; no code was copied.

SN-Net takes the moving and the fixed image to a mean space with ``u_mf`` and ``u_fm`` (half fields, on the mean grid);
DI-Net inverts a half field. Forward ``phi_mf o phi_fm^-1`` on the fixed grid, inverse ``phi_fm o phi_mf^-1`` on the
moving grid.

What differs from the paper:

* The magnitude constraint, printed as the mean of the signed vector sum, is the mean square of it.
* DI-Net learns from both half fields, the paper says one; both are needed for the inverse map.
* The weight of DI-Net's smoothness is 0.02; the printed 1 would blur the inverse.
* Each U-Net pads to multiples of 16, and fields outside their grid keep their border value instead of falling to zero.
* The inverse starts at DI-Net's and is finished by fixed-point steps (``inverse="dinet+refine"``); ``"dinet"``
  is the paper's.
* Size ``small``: the same three levels, each at half the published resolution (1/8, 1/4, 1/2), three poolings
  instead of four, the finest one fed with the 2 x 2 x 2 blocks of the full-resolution images as channels, its
  similarity measured at full resolution; SN-Net has instance normalisation (``norm``), without which it learned
  nothing in some hundred steps.
* ``antisymmetric`` makes the two half fields of a level opposite by construction, (f(m, f) - f(f, m)) / 2: their sum is
  what the similarity and labels cannot see, and the magnitude constraint alone was too weak to hold it.
* With ``passes`` the finest level is repeated with the same weights (``_passes``), and with ``force`` sees the gradient
  of the local correlation beside the images.
* ``di="residual"``: DI-Net predicts what -u lacks, from u / 8: at full size its own loss drowned that of SN-Net.
* The inverse is called dinet only where DI-Net's is better than -u and refinement moves it by less than half a voxel.
* Terms in squared lengths are in mm^2 (``voxel``), whatever lattice they are measured on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fields import FieldPair, compose, downsample2, resize, square_sum, warp
from ..fields.inversion import invert
from ..job import InputError
from ..losses import diffusion, lncc
from ._attention import up_blocks
from ._base import (
    Card,
    NetworkOutput,
    Note,
    Recipe,
    Stage,
    SymmetricNetwork,
    crop_to,
    differences,
    measured_pair,
    pad_to,
    register,
)
from ._blocks import Conv3d, in_full_precision, space_to_depth, steady_init, zero_init
from ._passes import CELL, HalfFields, MeanFramePasses, begin_as_step, both_orders, no_motion, similarity_force
from ._switches import REPEATED, Repeated, check_choices

#: Widths of the networks at half the resolution.
_HALF = {"encoder": (16, 32, 48), "decoder": (48, 32, 32), "tail": (16, 16), "finest": 2}
_CARD = Card(
    name="hsyn",
    label="HSyN",
    description="A network that takes both scans half-way to a common mean space and has learned to invert its "
    "own deformations.",
    title="HSyN: hierarchical symmetric normalisation, two half-way fields and a learned inverse",
    publication="Sha et al., Hierarchical Symmetric Normalization Registration using Deformation-Inverse Network, "
    "MICCAI 2024",
    inverse_method="dinet",
    deviations=differences(__doc__),
    bytes_per_voxel={"published": 750.0, "small": 250.0, "recurrent": 820.0},
    sizes={
        "published": {},
        "small": {**_HALF, "norm": True},
        "recurrent": {**_HALF, "antisymmetric": True, "di": "residual", "voxel": 2.0, **REPEATED},
    },
    half_on_cpu=True,
)


#: Voxels that count as one in DI-Net's input, where it corrects -u.
_UNIT = 8.0
#: Root mean square, voxels, by which refining may move DI-Net's inverse for it to be called that.
_KEPT = 0.5


@dataclass(frozen=True)
class _Switches(Repeated):
    """Arguments of :class:`HSyN`.

    Attributes:
        encoder, decoder, tail: channels of each U-Net.
        finest: lattice of the finest level: 1 = every voxel, 2 = every second.
        levels: 3, 2 or 1 (the paper's "w/o MT"); the finest ones stay.
        sn_mode: ``swap`` runs the network in both orders of input (paper), ``two_head`` once with two heads (its code).
        symmetric: False = one direction only (the paper's "w/o SN"): ``u_fm`` is zero.
        mag: ``smc``, ``mc`` (magnitudes only) or ``none``.
        inverse: ``dinet``, ``fixed_point`` or ``dinet+refine``.
        norm: instance normalisation in SN-Net; never in DI-Net, whose input's size matters.
        smooth: weight of the half fields' diffusion.
        antisymmetric: the half fields of a level are opposite by construction; needs ``swap`` and ``symmetric``.
        di: ``plain`` (paper), or ``residual``: DI-Net corrects -u.
        voxel: mm of the input's voxels, for the terms in mm^2.
        passes: need ``antisymmetric`` and ``finest`` 2.
    """

    encoder: Sequence[int] = (16, 32, 32, 32)
    decoder: Sequence[int] = (32, 32, 32, 32)
    tail: Sequence[int] = (32, 16, 16)
    finest: int = 1
    levels: int = 3
    sn_mode: str = "swap"
    symmetric: bool = True
    mag: str = "smc"
    inverse: str = "dinet+refine"
    norm: bool = False
    smooth: float = 1.0
    antisymmetric: bool = False
    di: str = "plain"
    voxel: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.passes and (not self.antisymmetric or self.finest != 2):
            raise InputError(
                f"passes={self.passes} needs opposite half fields on the lattice of every second voxel.",
                "Add antisymmetric=true and finest=2, or passes=0.",
            )
        if self.antisymmetric and not (self.symmetric and self.sn_mode == "swap"):
            raise InputError(
                "antisymmetric=true needs both orders of the scans.", "Add sn_mode=swap and symmetric=true."
            )
        check_choices(
            self,
            di=("plain", "residual"),
            finest=(1, 2),
            levels=(1, 2, 3),
            sn_mode=("swap", "two_head"),
            mag=("smc", "mc", "none"),
            inverse=("dinet", "fixed_point", "dinet+refine"),
        )


class _UNet(nn.Module):
    """VoxelMorph-2 layout: one convolution per scale down, one per scale up, a tail at full size, linear heads."""

    def __init__(self, channels: int, switches: _Switches, heads: int = 1, norm: bool = False):
        super().__init__()
        self.norm = norm
        encoder, decoder = list(switches.encoder), list(switches.decoder)
        skips = encoder[::-1]
        self.down = nn.ModuleList(_conv(a, b) for a, b in zip([channels, *encoder], encoder))
        inputs = [encoder[-1], *(a + b for a, b in zip(decoder, skips))]
        self.up = nn.ModuleList(_conv(a, b) for a, b in zip(inputs, decoder))
        tail = list(switches.tail)
        self.tail = nn.ModuleList(_conv(a, b) for a, b in zip([decoder[-1] + skips[-1], *tail], tail))
        steady_init(self)
        self.heads = nn.ModuleList(zero_init(Conv3d(tail[-1], 3, 3, padding=1)) for _ in range(heads))
        self.multiple = 2 ** len(encoder)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C, D, H, W) -> one (N, 3, D, H, W) field per head, voxels of this lattice, float32."""
        shape = x.shape[2:]
        x = pad_to(x, [-(-n // self.multiple) * self.multiple for n in shape])
        skips = []
        for conv in self.down:
            x = self._active(conv, x)
            skips.append(x)
            x = F.max_pool3d(x, 2)
        for conv in self.up:
            x = self._active(conv, x)
            x = torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skips.pop()], 1)
        for conv in self.tail:
            x = self._active(conv, x)
        return [crop_to(in_full_precision(head, x), shape) for head in self.heads]

    def _active(self, conv: nn.Module, x: Tensor) -> Tensor:
        x = conv(x)
        if self.norm and x.shape[2:].numel() > 1:
            x = F.instance_norm(x)
        return F.leaky_relu(x, 0.2)


def _conv(a: int, b: int) -> nn.Conv3d:
    return Conv3d(a, b, 3, padding=1)


def _up(u: Tensor, factor: int) -> Tensor:
    """A field on a ``factor`` times finer lattice, values times ``factor`` (mathematics.md, 1.6)."""
    return u if factor == 1 else factor * resize(u, [factor * n for n in u.shape[2:]])


@register
class HSyN(MeanFramePasses, SymmetricNetwork):
    """SN-Net and DI-Net. See the file's docstring; arguments: :class:`_Switches`."""

    card = _CARD

    def __init__(self, **switches) -> None:
        super().__init__()
        s = self.switches = _Switches(**switches)
        self.scales = [4 * s.finest, 2 * s.finest, s.finest][-s.levels :]
        self.windows = [3, 5, 7][-s.levels :]
        heads = 2 if s.sn_mode == "two_head" and s.symmetric else 1
        blocks = [16 if scale == 2 and scale == self.scales[-1] else 2 for scale in self.scales]
        if s.force:
            blocks[-1] += 3
        self.sn = nn.ModuleList(_UNet(channels, s, heads, s.norm) for channels in blocks)
        if s.force:  # from the finest scale's convolution through its skip to the tail and the head
            net: Any = self.sn[-1]
            begin_as_step([net.down[0], *net.tail, net.heads[0]], 16, [s.decoder[-1], *[0] * len(s.tail)])
        self.di = _UNet(3, s)
        self.recipe = _recipe(s.levels)

    # ------------------------------------------------------------------------------------------ fields

    def _view(self, image: Tensor, field: Tensor | None, scale: int) -> Tensor:
        """What a level sees of an image: warped at full resolution from the original, then brought to its lattice."""
        image = image if field is None else warp(image, field, padding="zeros")
        if scale == 2 and scale == self.scales[-1]:
            return space_to_depth(image)
        return _shrink(image, scale)

    def _predict(self, level: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One level's two increments of the half fields, voxels of its lattice."""
        net = self.sn[level]
        if not self.switches.symmetric:
            (a,) = net(torch.cat([x, y], 1))
            return a, torch.zeros_like(a)
        if self.switches.sn_mode == "two_head":
            a, b = net(torch.cat([x, y], 1))
            return a, b
        # Both orders as one batch: on a CPU small volumes are several times faster in company.
        (both,) = net(torch.cat([torch.cat([x, y], 1), torch.cat([y, x], 1)]))
        a, b = both.chunk(2)
        return ((a - b) / 2, (b - a) / 2) if self.switches.antisymmetric else (a, b)

    def half_fields(self, moving: Tensor, fixed: Tensor, level: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Increments (a_l, b_l) of the half fields of moving and fixed, per level, each on its own lattice."""
        found: list[tuple[Tensor, Tensor]] = []
        for index in range(level or self.switches.levels):
            scale = self.scales[index]
            if self.switches.passes and index + 1 == self.switches.levels:
                state = self._on_cells(found, moving)
                x, y = state.warped(moving, fixed)
                v = self.step(x, y, state, similarity_force(x, y) if self.switches.force else None, True)
                found.append((v, -v))
                break
            a, b = self.combined(found, 1) if found else (None, None)
            found.append(self._predict(index, self._view(moving, a, scale), self._view(fixed, b, scale)))
        return found

    def combined(self, increments: list[tuple[Tensor, Tensor]], scale: int) -> tuple[Tensor, Tensor]:
        """phi_1 o phi_2 o ... on the lattice of ``scale`` (1 = the input's), for both half fields, in its voxels."""
        totals = []
        for side in (0, 1):
            total = None
            for own, pair in zip(self.scales, increments):
                step = _up(pair[side], own // scale)
                total = step if total is None else compose(total, step)
            totals.append(total)
        return totals[0], totals[1]

    def _di(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """DI-Net: (the half-resolution field that is regularised, the inverse of ``u`` on its lattice)."""
        residual = self.switches.di == "residual"
        (raw,) = self.di(u / _UNIT if residual else u)
        half = 0.5 * resize(raw, [max(n // 2, 1) for n in raw.shape[2:]])
        w = 2 * resize(half, raw.shape[2:])
        return half, w - u if residual else w

    def _inverse(self, u: Tensor, lattice: Tensor) -> Tensor:
        """The inverse of a half field ``u`` (input grid); ``lattice`` is the same field where DI-Net works."""
        if self.switches.inverse == "fixed_point":
            return invert(u).field
        w = _up(self._di(lattice)[1], self.switches.finest)
        return w if self.switches.inverse == "dinet" else invert(u, start=w, iterations=20).field

    # ------------------------------------------------------------------------------------------ passes

    def _on_cells(self, increments: list[tuple[Tensor, Tensor]], like: Tensor) -> HalfFields:
        """The half fields of the coarser levels on the blocks of the finest one."""
        if not increments:
            return no_motion(like)
        return HalfFields(*(F.avg_pool3d(u, CELL) / CELL for u in self.combined(increments, 1)))

    def coarse_halves(self, moving: Tensor, fixed: Tensor) -> HalfFields:
        levels = self.switches.levels - 1
        return self._on_cells(self.half_fields(moving, fixed, levels) if levels else [], moving)

    def step(self, moving: Tensor, fixed: Tensor, state: HalfFields, force: Tensor | None, both: bool) -> Tensor:
        net = self.sn[-1]
        turning = () if force is None else (force,)
        return both_orders(lambda x: net(x)[0], space_to_depth(moving), space_to_depth(fixed), turning, both)

    def _forward_passes(self, moving: Tensor, fixed: Tensor) -> NetworkOutput:
        """Half fields by repeated passes, their inverses by DI-Net, finished by
        fixed-point steps (``dinet+refine``)."""
        state, notes = self.passed(moving, fixed)
        cells = torch.cat([state.to_moving, state.to_fixed])
        halves = up_blocks(cells, CELL)
        s, facts, method = self.switches, {}, "fixed_point"
        if s.inverse == "fixed_point":
            inverse = invert(halves, iterations=30).field
        else:
            guess = up_blocks(self._di(cells)[1], CELL)
            plain, learned = (square_sum(compose(halves, w)).mean().double().sqrt() for w in (-halves, guess))
            better, inverse, method = learned < plain, guess, "dinet"
            if s.inverse == "dinet+refine":
                inverse = invert(halves, start=torch.where(better, guess, -halves), iterations=30).field
            moved = square_sum(inverse - guess).mean().double().sqrt()
            # Root mean squares over the grid, voxels.
            facts = {"dinet_residual": learned, "minus_u_residual": plain, "refined_by": moved}
            if s.inverse != "dinet":
                text = "DI-Net's inverse was not good enough to be kept: the fixed-point inverse was taken"
                notes.append(Note(text, ~(better & (moved < _KEPT)), inverse_method="fixed_point"))
        a, b = halves.chunk(2)
        inverse_a, inverse_b = inverse.chunk(2)
        pair = measured_pair(compose(a, inverse_b), compose(b, inverse_a), method)
        aux = {"half_fields": (a, b), "half_inverses": (inverse_a, inverse_b), "notes": notes, "facts": facts}
        return NetworkOutput(pair, aux=aux)

    def forward(self, moving: Tensor, fixed: Tensor) -> NetworkOutput:
        self.check_inputs(moving, fixed)
        if self.switches.passes:
            return self._forward_passes(moving, fixed)
        increments = self.half_fields(moving, fixed)
        coarse = self.combined(increments, self.switches.finest)
        a, b = (_up(u, self.switches.finest) for u in coarse)
        inverse_a, inverse_b = self._inverse(a, coarse[0]), self._inverse(b, coarse[1])
        forward, inverse = compose(a, inverse_b), compose(b, inverse_a)
        method = "fixed_point" if self.switches.inverse == "fixed_point" else "dinet"
        pair: FieldPair = measured_pair(forward, inverse, method)
        return NetworkOutput(
            pair, aux={"half_fields": (a, b), "half_inverses": (inverse_a, inverse_b), "increments": increments}
        )

    # ------------------------------------------------------------------------------------------ training

    def objective(self, moving: Tensor, fixed: Tensor, level: int | None = None) -> dict[str, Tensor]:
        s = self.switches
        level = level or s.levels
        increments = self.half_fields(moving, fixed, level)
        scale = self.scales[level - 1]
        a, b = self.combined(increments, scale)
        # The finest level answers for the field as it is delivered: at full resolution.
        seen = 1 if level == s.levels else scale
        x = warp(_shrink(moving, seen), _up(a, scale // seen), padding="zeros")
        y = warp(_shrink(fixed, seen), _up(b, scale // seen), padding="zeros")
        terms = {"similarity": lncc(x, y, self.windows[level - 1]), "smooth": s.smooth * (diffusion(a) + diffusion(b))}
        mm2 = (scale * s.voxel) ** 2
        if s.symmetric and s.mag == "smc":
            # Both fields live on the mean grid, so a + b = 0 says exactly that its points are midpoints.
            terms["magnitude"] = 0.1 * mm2 * (a + b).square().mean()
        elif s.symmetric and s.mag == "mc":
            terms["magnitude"] = 0.1 * mm2 * (a.square().sum(1) - b.square().sum(1)).mean().abs()
        factor = scale // s.finest
        sides = (a, b) if s.symmetric else (a,)
        return {**terms, **self.learned_inverse_terms([_up(u.detach(), factor) for u in sides])}

    def learned_inverse_terms(self, fields: list[Tensor]) -> dict[str, Tensor]:
        """DI-Net's own loss on detached fields: mean squared composition (mm^2) and smoothness."""
        error, rough = [], []
        for u in fields:
            half, w = self._di(u)
            error.append((self.switches.finest * self.switches.voxel) ** 2 * compose(u, w).square().mean())
            rough.append(diffusion(half))
        return {"inverse": sum(error) / len(error), "inverse_smooth": 0.02 * sum(rough) / len(rough)}

    def map_terms(self, maps: list[tuple[Tensor | None, Tensor | None]]) -> dict[str, Tensor]:
        """L_smc in supervised steps as well, mm^2: labels and true maps do not see the sum of the
        half fields either."""
        if not self.switches.symmetric or self.switches.mag != "smc":
            return {}
        return {"magnitude": sum(0.1 * self.switches.voxel**2 * (a + b).square().mean() for a, b in maps)}

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """SN-Net and DI-Net, whose loss is of another size."""
        return [list(self.sn.parameters()), list(self.di.parameters())]

    def mappings(
        self, moving: Tensor, fixed: Tensor, level: int | None = None
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        level = level or self.switches.levels
        scale = self.scales[level - 1]
        a, b = self.combined(self.half_fields(moving, fixed, level), scale)
        return [(_up(a, scale), _up(b, scale))]

    def parameter_groups(self, level: int) -> list[nn.Parameter]:
        return [*self.sn[level - 1].parameters(), *self.di.parameters()]


def _shrink(image: Tensor, scale: int) -> Tensor:
    return downsample2(image, scale.bit_length() - 1)


def _recipe(levels: int) -> Recipe:
    """Adam 1e-4, 150k steps: 30k, 30k, 90k for levels 1 to 3, coarser levels frozen for the first 4k of a stage."""
    iterations = [30_000, 30_000, 90_000][-levels:]
    stages = tuple(Stage(level, n, 1e-4, frozen=4_000 if level > 1 else 0) for level, n in enumerate(iterations, 1))
    return Recipe(stages, batch=1, notes="random ordered pairs, affinely aligned")


HSyN.recipe = _recipe(3)
