"""SM-GICNet: a stationary velocity from a four-level Haar pyramid, trained in both directions at once.

Paper: "Symmetric Multi-level Gradient-Inverse Consistency Network", MIDL 2025. Written from the paper and from facts
about its code; no code was copied.

Level l of 1/8, 1/4, 1/2, 1/1 sees the low-pass pair warped by the level before, that level's displacement, at 1/4 and
1/2 the energy maps of the Haar details, and adds a bounded velocity. The map is exp(V), its inverse exp(-V).

What differs from the paper or its code:

* The pyramid is computed on the fly; low-pass bands are divided by 2^1.5 per level, energy maps by their
  99.5 % quantile.
* Total velocity V_l = up(V_{l-1}) + R softsign(head); the code integrates a displacement a second time.
  ``compose="displacement"`` composes the levels' maps instead. R is given per level in parts of the half extent.
* The inverse-consistency term is GradICON's between the two network directions (``inv``); the paper's formula is zero
  by construction for exp(V), exp(-V). The symmetric term compares images of one space, as the code does.
* Difference weighting uses the absolute value at both levels; the paper's gate keeps the encoder's skip.
* ``antisymmetric="result"`` delivers exp of (V_AB - V_BA) / 2; ``"levels"`` takes that mean at every level already, in
  training too: exchanging the inputs then exchanges the two maps exactly. ``"none"`` is the paper's.
* Head weights start near zero; smoothness in voxels carries the factor 4 that the change of unit brings.
* Between levels fields are upsampled as blocks of two voxels, which is where Haar's coarse samples lie.
* Size ``small``: widths 32, 32, 16, 16, and level 4 works at 1/2 on the eight Haar bands of the full-resolution pair.
* Size ``recurrent``: as small, but level 4 does so ``passes`` times with the same weights, in the mean frame of both
  scans (``_passes``), and with ``force`` sees the gradient of the local correlation beside the bands.
* Where ``antisymmetric="levels"`` or ``passes`` make both directions inverse by construction, no loss asks for it:
  the inverse similarity, symmetry and gradient-inverse-consistency terms would be zero or repeat the others and
  are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fields import compose, exponentiate, scale_channels, warp
from ..job import InputError
from ..losses import diffusion, lncc, mse
from ._attention import up_blocks
from ._base import Card, NetworkOutput, Recipe, Stage, SymmetricNetwork, differences, measured_pair, register
from ._blocks import haar, steady_init, zero_init
from ._passes import CELL, HalfFields, MeanFramePasses, begin_as_step, both_orders, no_motion, of_velocity
from ._sm_gicnet_levels import Head, Level1, Level4, Level23, Pyramid, Residual, weigh_difference
from ._switches import REPEATED, Repeated, check_choices

_SMALL = {"widths": (32, 32, 16, 16), "fine": "bands", "antisymmetric": "levels"}
_CARD = Card(
    name="sm-gicnet",
    label="SM-GICNet",
    description="A network that predicts a velocity field on several levels. Forward and inverse are exact "
    "exponentials of the same field, so the deformation cannot fold.",
    title="SM-GICNet: symmetric multi-level network with gradient inverse consistency, velocity field",
    publication="Symmetric Multi-level Gradient-Inverse Consistency Network, MIDL 2025",
    inverse_method="svf",
    deviations=differences(__doc__),
    bytes_per_voxel={"published": 1200.0, "small": 220.0, "recurrent": 710.0},
    sizes={
        "published": {},
        "small": _SMALL,
        "recurrent": {**_SMALL, "ranges": (0.8, 0.4, 0.4, 0.1), "smooth": 0.25, **REPEATED},
    },
    half_on_cpu=True,
)

_WINDOWS = (3, 5, 7, 9)
#: Cells that count as one for the repeated level, which may work on any part of a volume, in the place of the
#: half extent.
_UNIT = 20.0


@dataclass(frozen=True)
class _Switches(Repeated):
    """Arguments of :class:`SMGICNet`.

    Attributes:
        widths: channels of the four levels, coarsest first.
        levels: 4 to 1; the finest ones stay (1 = the paper's "w/o multi-level").
        fine: what level 4 works on: ``full`` resolution, or the Haar ``bands`` at half of it.
        symmetric: False trains on (A, B) only (the paper's "w/o symmetric structure").
        antisymmetric: ``none``, ``result`` or ``levels``.
        compose: ``velocity`` or ``displacement``.
        gate: ``paper``, ``code`` or ``none``.
        inv, inv_weight: ``gradicon_cross``, ``icon_cross``, ``icon_self`` or ``none``; 0.01 in the paper,
            1.5 in GradICON.
        ranges: R of the four levels, parts of the half extent; of a repeated level, parts of 20 cells.
        smooth, anti_fold: multiply the smoothness terms and the code's anti-folding term.
        passes: of level 4; 0 = once, in the fixed scan's frame. Need ``fine`` bands and ``antisymmetric`` levels.
    """

    widths: Sequence[int] = (32, 32, 32, 32)
    levels: int = 4
    fine: str = "full"
    symmetric: bool = True
    antisymmetric: str = "result"
    compose: str = "velocity"
    gate: str = "paper"
    inv: str = "gradicon_cross"
    inv_weight: float = 0.01
    ranges: Sequence[float] = (0.8, 0.4, 0.4, 0.4)
    smooth: float = 1.0
    anti_fold: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(
            self,
            levels=(1, 2, 3, 4),
            fine=("full", "bands"),
            antisymmetric=("none", "result", "levels"),
            compose=("velocity", "displacement"),
            gate=("paper", "code", "none"),
            inv=("gradicon_cross", "icon_cross", "icon_self", "none"),
        )
        if len(self.ranges) != 4 or min(self.ranges) <= 0:
            raise InputError(f"ranges is {self.ranges!r}.", "Give four positive numbers, coarsest level first.")
        if self.passes and (self.fine != "bands" or self.antisymmetric != "levels"):
            raise InputError(
                f"passes={self.passes} needs the Haar bands and antisymmetric levels.",
                "Add fine=bands and antisymmetric=levels, or passes=0.",
            )
        if self.antisymmetric != "none" and (not self.symmetric or self.compose == "displacement"):
            raise InputError(
                f"antisymmetric={self.antisymmetric} needs both directions and a velocity.",
                "Add antisymmetric=none, or leave out symmetric=False and compose=displacement.",
            )


@dataclass(frozen=True, eq=False)
class _Direction:
    """One direction at one level, voxels of its lattice; ``inverse`` only where it was asked for."""

    velocity: Tensor | None
    phi: Tensor
    inverse: Tensor | None


@register
class SMGICNet(MeanFramePasses, SymmetricNetwork):
    """The four levels. See the file's docstring; arguments: :class:`_Switches`."""

    card = _CARD
    stationary = True

    def __init__(self, **switches) -> None:
        super().__init__()
        s = self.switches = _Switches(**switches)
        bands = s.fine == "bands"
        nets = [
            Level1(s.widths[0]),
            Level23(s.widths[1], 2),
            Level23(s.widths[2], 3),
            Level4(s.widths[3], s.gate, 16 if bands else 2, 6 if s.force else 3),
        ]
        self.nets = nn.ModuleList(nets[-s.levels :])
        self._initialise()
        # Which of the four levels each one is, and its lattice.
        self.kinds = list(range(4))[-s.levels :]
        self.scales = [8, 4, 2, 2 if bands else 1][-s.levels :]
        self.recipe = _recipe(s.levels)

    def _initialise(self) -> None:
        steady_init(self)
        for part in self.modules():
            if isinstance(part, Residual):  # starts as little more than its skip, however many follow each other
                nn.init.kaiming_normal_(part.b.weight, 5.0)
            elif isinstance(part, Head):
                zero_init(part.b, 1e-3)
        if self.switches.force:
            last = self.nets[-1]
            with torch.no_grad():
                last.encode[0].b.weight[:6] = 0.0
            # The inlet's two, past the first residual, the head's two: its input is (decoder, first map).
            path, c = [last.inlet[0], last.inlet[2], last.head.a, last.head.b], self.switches.widths[3]
            begin_as_step(path, 16 + 3, [0, c, 0], self.switches.ranges[3] * _UNIT, [True, False, True])

    def _increments(self, level: int, ways: list[tuple[Pyramid, Pyramid, Tensor]]) -> list[Tensor]:
        """The velocities that a level adds, per way (moving, fixed, the map so far on the level's lattice).

        All ways pass the network as one batch: on a CPU small volumes are several times faster in company.
        """
        flows = torch.cat([flow for *_, flow in ways])
        inputs = [self._inputs(level, *way) for way in ways]
        pair = torch.cat([pair for pair, _ in inputs])
        energy = None if inputs[0][1] is None else torch.cat([energy for _, energy in inputs])
        half = [n / 2 for n in flows.shape[2:]]
        raw = self.nets[level](pair, energy, scale_channels(flows, [1 / n for n in half]))
        return list((self.switches.ranges[self.kinds[level]] * scale_channels(raw, half)).chunk(len(ways)))

    def _inputs(self, level: int, a: Pyramid, b: Pyramid, flow: Tensor) -> tuple[Tensor, Tensor | None]:
        """Image and energy channels of a level for moving ``a``, fixed ``b``."""
        kind, scale = self.kinds[level], self.scales[level]
        if kind == 3:
            pair = weigh_difference(warp(a.low[1], up_blocks(flow, scale)), b.low[1])
            pair = torch.cat([haar(x) / 8**0.5 for x in pair] if scale == 2 else pair, 1)
        else:
            pair = (warp(a.low[scale], flow), b.low[scale])
            pair = torch.cat(weigh_difference(*pair) if kind == 2 else pair, 1)
        return pair, torch.cat([warp(a.energy[scale], flow), b.energy[scale]], 1) if kind in (1, 2) else None

    def _advance(self, before: _Direction | None, increment: Tensor, factor: int, inverse: bool) -> _Direction:
        """The total map of a level from that of the level before (``factor`` coarser) and its increment."""
        if self.switches.compose == "velocity":
            v = increment if before is None else up_blocks(before.velocity, factor) + increment
            return _Direction(v, exponentiate(v), exponentiate(-v) if inverse else None)
        phi, back = exponentiate(increment), exponentiate(-increment)
        if before is not None:
            phi, back = compose(up_blocks(before.phi, factor), phi), compose(back, up_blocks(before.inverse, factor))
        return _Direction(None, phi, back)

    def run(
        self, moving: Tensor, fixed: Tensor, level: int | None = None, both: bool = True
    ) -> list[tuple[_Direction, _Direction | None]]:
        """Per level: (moving -> fixed, fixed -> moving), the second ``None`` unless ``both``."""
        s, a, b = self.switches, Pyramid(moving), Pyramid(fixed)
        steps: list[tuple[_Direction, _Direction | None]] = []
        ab = ba = None
        for index in range(level or s.levels):
            scale = self.scales[index]
            factor = self.scales[index - 1] // scale if steps else 1
            zero = moving.new_zeros((len(moving), 3, *(n // scale for n in moving.shape[2:])))
            flows = [up_blocks(d.phi, factor) if d is not None else zero for d in (ab, ba)]
            if s.passes and index + 1 == s.levels:
                steps.append(self._passed_directions(moving, fixed, ab, factor))
                break
            last = index + 1 == (level or s.levels)
            ways = [(a, b, flows[0]), (b, a, flows[1])]
            d_ab, d_ba = self._increments(index, ways) if both else (*self._increments(index, ways[:1]), None)
            if s.antisymmetric == "levels":
                ab = self._advance(ab, (d_ab - d_ba) / 2, factor, True)
                ba = _Direction(-ab.velocity, ab.inverse, ab.phi)
            else:
                ab = self._advance(ab, d_ab, factor, last)
                ba = self._advance(ba, d_ba, factor, last) if both else None
            steps.append((ab, ba))
        return steps

    def _passed_directions(
        self, moving: Tensor, fixed: Tensor, before: _Direction | None, factor: int
    ) -> tuple[_Direction, _Direction]:
        """The finest level as the trainer of single levels sees it: one pass behind the levels
        before, both directions."""
        h = up_blocks(before.velocity / 2, factor) if before is not None else no_motion(moving).to_moving
        v = 2 * self.refined(moving, fixed, of_velocity(h)).velocity
        phi, back = exponentiate(v), exponentiate(-v)
        return _Direction(v, phi, back), _Direction(-v, back, phi)

    def coarse_halves(self, moving: Tensor, fixed: Tensor) -> HalfFields:
        """The half-way map of all levels but the finest."""
        if self.switches.levels == 1:
            return no_motion(moving, True)
        ab, _ = self.run(moving, fixed, self.switches.levels - 1)[-1]
        return of_velocity(up_blocks(ab.velocity / 2, self.scales[-2] // self.scales[-1]))

    def step(self, moving: Tensor, fixed: Tensor, state: HalfFields, force: Tensor | None, both: bool) -> Tensor:
        x, y = (haar(image) / 8**0.5 for image in weigh_difference(moving, fixed))
        turning = ((state.to_moving - state.to_fixed) / _UNIT, *(() if force is None else (force,)))

        def raw(inputs: Tensor) -> Tensor:
            return self.nets[-1](inputs[:, :16], None, inputs[:, 16:])

        return self.switches.ranges[3] * _UNIT * both_orders(raw, x, y, turning, both)

    def forward(self, moving: Tensor, fixed: Tensor) -> NetworkOutput:
        self.check_inputs(moving, fixed)
        s = self.switches
        if s.passes:
            state, notes = self.passed(moving, fixed)
            pair = measured_pair(*state.full(), "svf")
            return NetworkOutput(pair, up_blocks(2 * state.velocity, CELL), aux={"half_fields": state, "notes": notes})
        steps = self.run(moving, fixed, both=s.antisymmetric != "none")
        ab, ba = steps[-1]
        velocity, phi, back = ab.velocity, ab.phi, ab.inverse
        if s.antisymmetric == "result":
            velocity = (ab.velocity - ba.velocity) / 2
            phi, back = exponentiate(velocity), exponentiate(-velocity)
        scale = self.scales[-1]
        pair = measured_pair(up_blocks(phi, scale), up_blocks(back, scale), "svf")
        return NetworkOutput(pair, None if velocity is None else up_blocks(velocity, scale), aux={"levels": steps})

    # ------------------------------------------------------------------------------------------ training

    def objective(self, moving: Tensor, fixed: Tensor, level: int | None = None) -> dict[str, Tensor]:
        s = self.switches
        level = level or s.levels
        steps = self.run(moving, fixed, level, both=s.symmetric)
        a, b = Pyramid(moving), Pyramid(fixed)
        terms: dict[str, list[Tensor]] = {"similarity": [], "smooth": [], "anti_fold": []}
        for index, pair in enumerate(steps):
            weight = 2.0 ** (index + 1 - level)
            for direction, x, y in _ways(pair, a, b):
                terms["similarity"].append(weight * self._similarity(index, direction.phi, x, y))
                terms["smooth"].append(weight * 4 * s.smooth * diffusion(direction.phi))
                terms["anti_fold"].append(weight * s.anti_fold * anti_fold(direction.phi))
        terms["multi_level"] = self._multi_level(steps, level, a, b)
        if s.antisymmetric != "levels":
            terms.update(self._inverse_terms(steps[-1], level, a, b))
        return {name: sum(parts) for name, parts in terms.items() if parts}

    def _seen(self, index: int) -> int:
        """Scale of the images that a level is judged by: level 4's is always 1."""
        return 1 if self.kinds[index] == 3 else self.scales[index]

    def _similarity(self, index: int, phi: Tensor, a: Pyramid, b: Pyramid) -> Tensor:
        """-LNCC of the level's low-pass pair, and of its energy pair at 1/4 and 1/2."""
        kind, scale, seen = self.kinds[index], self.scales[index], self._seen(index)
        total = lncc(warp(a.low[seen], up_blocks(phi, scale // seen)), b.low[seen], _WINDOWS[kind])
        if kind in (1, 2):
            total = total + lncc(warp(a.energy[scale], phi), b.energy[scale], _WINDOWS[kind])
        return total

    def _multi_level(self, steps, level: int, a: Pyramid, b: Pyramid) -> list[Tensor]:
        """L_Mu = MSE(w_i, (w_i + w_{i-1}) / 2): the level must not throw away what the one before found."""
        if level < 2:
            return []
        terms, scale, seen = [], self.scales[level - 1], self._seen(level - 1)
        for (now, image, _), before in zip(_ways(steps[-1], a, b), steps[-2]):
            moved = [
                warp(image.low[seen], up_blocks(d.phi, own // seen))
                for d, own in ((now, scale), (before, self.scales[level - 2]))
            ]
            terms.append(0.0005 * 0.25 * mse(*moved))
        return terms

    def _inverse_terms(self, step, level: int, a: Pyramid, b: Pyramid) -> dict[str, list[Tensor]]:
        """What ties the two directions and their inverses together at the finest level in use."""
        s, (ab, ba) = self.switches, step
        kind, seen = self.kinds[level - 1], self._seen(level - 1)
        factor = self.scales[level - 1] // seen
        x, y = a.low[seen], b.low[seen]
        terms: dict[str, list[Tensor]] = {
            "inverse_similarity": [],
            "inverse_smooth": [],
            "inverse": [],
            "symmetric": [],
        }
        for d, m, f in _ways(step, x, y):
            terms["inverse_similarity"].append(
                0.1 * lncc(warp(f, up_blocks(d.inverse, factor)), m, 3 if kind < 2 else 7)
            )
            terms["inverse_smooth"].append((0.1 if kind < 2 else 1.0) * 4 * s.smooth * diffusion(d.inverse))
        if ba is not None:
            for one, other, image in ((ab, ba, y), (ba, ab, x)):
                terms["symmetric"].append(
                    0.001 * mse(*(warp(image, up_blocks(u, factor)) for u in (one.inverse, other.phi)))
                )
        if s.inv == "icon_self" or ba is None:
            loops = [(d.phi, d.inverse) for d, *_ in _ways(step, x, y)]
        else:
            loops = [(ab.phi, ba.phi), (ba.phi, ab.phi)]
        for one, other in loops if s.inv != "none" else ():
            c = compose(one, other)
            # 9: diffusion averages over 3 axes and 3 channels, the Frobenius norm sums over both.
            error = 9 * diffusion(c) if s.inv == "gradicon_cross" else c.square().mean()
            terms["inverse"].append(s.inv_weight * error)
        return terms

    def mappings(
        self, moving: Tensor, fixed: Tensor, level: int | None = None
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        level = level or self.switches.levels
        ab, ba = self.run(moving, fixed, level, both=self.switches.symmetric)[-1]
        scale = self.scales[level - 1]
        return [(up_blocks(ab.phi, scale), None), *([] if ba is None else [(None, up_blocks(ba.phi, scale))])]

    def parameter_groups(self, level: int) -> list[nn.Parameter]:
        return list(self.nets[level - 1].parameters())


def _ways(step, a, b) -> list[tuple]:
    """(direction, its moving image, its fixed image) of the directions that were run."""
    return [way for way in ((step[0], a, b), (step[1], b, a)) if way[0] is not None]


def anti_fold(u: Tensor) -> Tensor:
    """ICNet's term: mean of relu(t) t^2, t = u(x) - u(x + 1) - 1, along every axis for all channels,
    summed over axes."""
    total = u.new_zeros(())
    for dim in (2, 3, 4):
        n = u.shape[dim]
        t = F.relu(u.narrow(dim, 0, n - 1) - u.narrow(dim, 1, n - 1) - 1)
        total = total + (t * t * t).mean()
    return total


def _recipe(levels: int) -> Recipe:
    """The code's lengths; the paper halves the rate every 50k steps after the first 60k of a level."""
    iterations = [30_000, 40_000, 60_000, 80_000][-levels:]
    stages = tuple(Stage(level, n, 1e-4, frozen=3_000 if level > 1 else 0) for level, n in enumerate(iterations, 1))
    return Recipe(
        stages,
        batch=1,
        halve_every=50_000,
        halve_after=60_000,
        notes="all ordered pairs, shuffled, not affinely aligned",
    )


SMGICNet.recipe = _recipe(4)
