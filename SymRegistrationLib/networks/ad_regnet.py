"""AD-RegNet: a shared U-Net, cross-attention both ways, regional attention, and a gated coarse-to-fine synthesis.

Paper: "AD-RegNet", arXiv 2602.07088. Written from the paper; no code of it is public.

Both images pass one 5-level U-Net. Per level, decoder features D_M, D_F exchange information by bidirectional
cross-attention (BCAM); regional attention (RAA) weighs the result; a head predicts a displacement; a gate W blends it
with the upsampled coarser one; the finest field warps the moving image once.

What differs from the paper, or fills a gap of it:

* Attention at every level, as printed, needs terabytes. Per level (``attn_levels``, finest first): ``full``, ``window``
  (4^3 queries, 12^3 keys) or ``none``; by default full at 1/16 and 1/8, windowed at 1/4, none at 1/2 and 1/1.
* Queries and keys carry a 3-D sinusoidal position; besides values, attention returns the expected offset to the match,
  which goes straight into the head: values alone cannot say where a match lies. The offset seen from the moving grid
  enters with the opposite sign. Keys start with the other side's query matrix, so that like attends to like from the
  first step.
* ``fusion="compose"`` (default): the level predicts what the coarser field left over, on moving features warped by that
  field, and the maps are composed: an unattended fine level sees a few voxels only, and could not predict, as the
  paper's convex ``blend`` asks of it, the total displacement. For large motion compose is the better of the two.
* RAA weighs regions where they are (the printed sum would lose the layout); regions are counted in input voxels.
* The gate is sigmoid(f([F, Up(Phi)])); the undefined factor M is 1, or the RAA map with ``modulate=True`` (cut
  to [0, 1]).
* ``multires=False`` predicts one field at the finest level from the sum of all levels' upsampled features.
* Fields go up as blocks of two voxels, which is where the cells of strided 2^3 convolutions lie.
* No inverse is defined. The network runs both ways on the shared features, and the two maps are made inverse to each
  other (``inverse="balanced"``): each becomes the mean of itself and the other's fixed-point inverse. ``"fixed_point"``
  inverts one run, ``"swapped"`` returns both runs as they are. Training treats both directions (``symmetric``) and adds
  the mean squared composition, weight 0.01 (``consistency``); 0 and ``symmetric=False`` are the paper's.
* The landmark term, a pull-back in voxels / 10 (Huber), is off by default (``landmark=0``).
* Heads see D_M - D_F in the place of D_M: the same information, but the first steps of learning count three
  times as much.
* Instance normalisation and leaky ReLU 0.2, which the paper does not name.
* Size ``small``: four levels at 1/2 to 1/16, fed by 2^3 blocks of the full-resolution image as channels.
* With ``passes`` the whole network is repeated with the same weights in the mean frame of both scans (``_passes``):
  half of the mean of both directions' fields goes to each side. With ``force`` the finest level sees the gradient of
  the local correlation as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fields import compose, sample_at, warp
from ..losses import diffusion, ncc, negative_jacobian, ssim
from ._ad_regnet_attention import UNIT, CrossAttention, RegionalAttention
from ._attention import finished_pair, up_blocks
from ._base import Card, NetworkOutput, Recipe, Stage, SymmetricNetwork, differences, register
from ._blocks import Conv3d, space_to_depth, zero_init
from ._passes import CELL, HalfFields, MeanFramePasses, begin_as_step, passed_output
from ._switches import REPEATED, Repeated, check_choice, check_choices

_SMALL = {"channels": (16, 32, 64, 128), "finest": 2, "attn_levels": ("none", "window", "full", "full")}
_CARD = Card(
    name="ad-regnet",
    label="AD-RegNet",
    description="A network with attention between the two scans and gated fields of several resolutions.",
    title="AD-RegNet: shared U-Net, bidirectional cross-attention, regional attention, gated multi-resolution fields",
    publication="AD-RegNet, arXiv 2602.07088, 2026",
    deviations=differences(__doc__),
    inverse_method="fixed_point",
    bytes_per_voxel={"published": 1650.0, "small": 180.0, "recurrent": 640.0},
    sizes={"published": {}, "small": _SMALL, "recurrent": {**_SMALL, "channels": (16, 32, 48, 80), **REPEATED}},
)

_HIDDEN = 32


@dataclass(frozen=True)
class _Switches(Repeated):
    """Arguments of :class:`ADRegNet`.

    Attributes:
        channels: per level, finest first.
        finest: lattice of level 0: 1 = every voxel, 2 = every second.
        bcam: cross-attention at all.
        raa: regional attention at all.
        multires: fields at every level, or one at the finest.
        attn_levels: ``full``, ``window`` or ``none`` per level, finest first.
        fusion: ``compose`` or ``blend`` (paper).
        head_in: ``all`` = attention, D_F and D_M - D_F, ``A`` = the attention's result alone, as printed.
        region: edge of RAA's regions in input voxels; levels whose cells do not divide it have none.
        modulate: multiply the gate with RAA's map.
        inverse: ``balanced``, ``fixed_point`` or ``swapped``.
        symmetric: train both directions.
        consistency: weight of the mean squared composition, voxel^2 of the finest lattice.
        landmark: weight of the landmark term, when the objective is given points; the paper's is 1.
        passes: of the whole network; need ``finest`` 2. force: seen by the finest level.
    """

    channels: Sequence[int] = (32, 64, 128, 256, 512)
    finest: int = 1
    bcam: bool = True
    raa: bool = True
    multires: bool = True
    attn_levels: Sequence[str] = ("none", "none", "window", "full", "full")
    fusion: str = "compose"
    head_in: str = "all"
    region: int = 16
    modulate: bool = False
    inverse: str = "balanced"
    symmetric: bool = True
    consistency: float = 0.01
    landmark: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.passes:
            check_choice("finest with passes", self.finest, (CELL,))
        check_choices(
            self,
            finest=(1, 2),
            fusion=("compose", "blend"),
            head_in=("all", "A"),
            inverse=("balanced", "fixed_point", "swapped"),
        )
        check_choice("number of attn_levels", len(self.attn_levels), (len(self.channels),))
        check_choice("deepest lattice", self.finest * 2 ** (len(self.channels) - 1), (2, 4, 8, 16))
        for kind in self.attn_levels:
            check_choice("attn_levels", kind, ("full", "window", "none"))


# ---------------------------------------------------------------------------------------------- backbone


def _conv(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(
        Conv3d(a, b, 3, padding=1, bias=False), nn.InstanceNorm3d(b, affine=True), nn.LeakyReLU(0.2, inplace=True)
    )


class UNet(nn.Module):
    """One image to decoder features of every level, finest first; the deepest are the encoder's."""

    def __init__(self, channels: Sequence[int], inlet: int):
        super().__init__()
        inputs = [inlet, *channels[:-1]]
        self.encode = nn.ModuleList(nn.Sequential(_conv(a, b), _conv(b, b)) for a, b in zip(inputs, channels))
        self.down = nn.ModuleList(Conv3d(c, c, 2, stride=2) for c in channels[:-1])
        self.grow = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in zip(channels, channels[1:]))
        self.decode = nn.ModuleList(nn.Sequential(_conv(2 * c, c), _conv(c, c)) for c in channels[:-1])

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.encode[0](x)]
        for down, encode in zip(self.down, self.encode[1:]):
            maps.append(encode(down(maps[-1])))
        for level in reversed(range(len(self.decode))):
            maps[level] = self.decode[level](torch.cat([self.grow[level](maps[level + 1]), maps[level]], 1))
        return maps


# ---------------------------------------------------------------------------------------------- levels


class _Level(nn.Module):
    """Attention, regional weights, head and gate of one level."""

    def __init__(
        self, channels: int, kind: str, region: int, switches: _Switches, head: bool, gate: bool, turning: int = 0
    ):
        super().__init__()
        self.switches = switches
        self.attention = CrossAttention(channels, kind) if switches.bcam and kind != "none" else None
        self.regions = RegionalAttention(channels, region) if switches.raa and region else None
        width, offsets = 2 * channels, 0
        if self.attention is not None:
            width = channels if switches.head_in == "A" else 3 * channels
            offsets = 3 * self.attention.heads
        self.hidden = _conv(width + turning, _HIDDEN)
        width = _HIDDEN + (offsets if switches.multires else 0) + turning
        self.head = zero_init(Conv3d(width, 3, 3, padding=1)) if head else None
        if turning:  # a gate that starts at 1/2, and a quarter of both directions' fields to each side
            begin_as_step([self.head], width - turning, [], 0.25)
        self.gate = Conv3d(channels + 3, 1, 3, padding=1) if gate else None

    def features(self, moving: Tensor, fixed: Tensor, force: Tensor | None = None) -> dict[str, Any]:
        """What the head needs: F' (``mixed``), hidden map, offsets to the match; and RAA's map."""
        mixed, offset, weights = fixed, None, None
        if self.attention is not None:
            mixed, offset = self.attention(moving, fixed)
        if self.regions is not None:
            weights = self.regions(mixed)
            mixed = mixed * weights.to(mixed.dtype)
        if self.attention is None:
            inputs = [mixed, moving - fixed]
        else:
            inputs = [mixed] if self.switches.head_in == "A" else [mixed, fixed, moving - fixed]
        if force is not None:
            inputs.append(force)
        return {
            "mixed": mixed,
            "hidden": self.hidden(torch.cat(inputs, 1)),
            "offset": offset,
            "regions": weights,
            "force": force,
        }

    def predict(self, found: dict[str, Any]) -> Tensor:
        """The level's own displacement, cells, float32."""
        inputs = [found["hidden"]] + ([] if found["offset"] is None else [found["offset"] / UNIT])
        if found.get("force") is not None:
            inputs.append(found["force"])
        return self.head(torch.cat(inputs, 1)).float()

    def fuse(self, own: Tensor, coarse: Tensor, found: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(total displacement, gate W) from the level's own and the upsampled coarser one, both in cells."""
        gate = self.gate(torch.cat([found["mixed"], (coarse / UNIT).to(found["mixed"].dtype)], 1)).float().sigmoid()
        if self.switches.modulate and found["regions"] is not None:
            gate = (gate * found["regions"]).clamp(0, 1)
        return fuse(own, coarse, gate, self.switches.fusion), gate


def fuse(own: Tensor, coarse: Tensor, gate: Tensor, fusion: str) -> Tensor:
    """``blend``: W own + (1 - W) coarse (eq. 15). ``compose``: coarse o W own. All on one lattice."""
    return compose(coarse, gate * own) if fusion == "compose" else gate * own + (1 - gate) * coarse


@register
class ADRegNet(MeanFramePasses, SymmetricNetwork):
    """The whole network. See the file's docstring; arguments: :class:`_Switches`."""

    card = _CARD
    recipe = Recipe(
        (Stage(1, 92_000, 1e-4),),
        batch=1,
        halve_every=9_200,
        notes="200 epochs of about 460 pairs, rate halved every 20 epochs, early stopping after 20; counts are "
        "those of IXI, the paper gives epochs only",
    )

    def __init__(self, **switches) -> None:
        super().__init__()
        s = self.switches = _Switches(**switches)
        self.backbone = UNet(s.channels, 1 if s.finest == 1 else 8)
        last, levels = len(s.channels) - 1, []
        for index, (c, kind) in enumerate(zip(s.channels, s.attn_levels)):
            scale = s.finest * 2**index
            region = s.region // scale if s.region % scale == 0 else 0
            levels.append(
                _Level(
                    c,
                    kind,
                    region,
                    s,
                    head=s.multires or index == 0,
                    gate=s.multires and index < last,
                    turning=3 if s.force and index == 0 else 0,
                )
            )
        self.stages = nn.ModuleList(levels)

    # ------------------------------------------------------------------------------------------ fields

    def features(self, image: Tensor) -> list[Tensor]:
        """Decoder features of one image, finest first; the same weights for both images."""
        return self.backbone(image if self.switches.finest == 1 else space_to_depth(image))

    def direction(
        self, moving: list[Tensor], fixed: list[Tensor], force: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The displacement on the finest lattice, its cells, and what can be looked at, from features."""
        if force is None and self.switches.force:
            force = torch.zeros_like(fixed[0][:, :3], dtype=torch.float32)
        aux: dict[str, Any] = {"levels": {}, "attention": {}, "regions": {}, "gate": {}}
        total: Tensor | None = None
        hidden: Tensor | int = 0
        for index in reversed(range(len(self.stages))):
            stage, m = self.stages[index], moving[index]
            coarse = None if total is None else up_blocks(total, 2)
            if coarse is not None and self.switches.fusion == "compose":
                m = warp(m.float(), coarse).to(m.dtype)  # half precision would blur the places themselves
            found = stage.features(m, fixed[index], force if index == 0 else None)
            if found["offset"] is not None:
                aux["attention"][index] = found["offset"].unflatten(1, (-1, 3)).mean(1)
            if found["regions"] is not None:
                aux["regions"][index] = found["regions"]
            if not self.switches.multires:
                hidden = found["hidden"] + (0 if index == len(self.stages) - 1 else up_blocks(hidden, 2) / 2)
                continue
            own = stage.predict(found)
            total = own
            if coarse is not None:
                total, aux["gate"][index] = stage.fuse(own, coarse, found)
            aux["levels"][index] = total
        if total is None:
            total = self.stages[0].predict({"hidden": hidden, "offset": None, "force": found["force"]})
        return total, aux

    def forward(self, moving: Tensor, fixed: Tensor) -> NetworkOutput:
        """Both directions; ``aux`` holds, per level (0 = finest), fields (``levels``), mean offset to the attended
        match in cells (``attention``), RAA's map (``regions``) and W (``gate``) of the direction moving -> fixed."""
        self.check_inputs(moving, fixed)
        if self.switches.passes:
            return passed_output(self, moving, fixed)
        m, f = self.features(moving), self.features(fixed)
        u, aux = self.direction(m, f)
        w = None if self.switches.inverse == "fixed_point" else self.direction(f, m)[0]
        return NetworkOutput(finished_pair(u, w, self.switches.inverse, self.switches.finest), aux=aux)

    def step(self, moving: Tensor, fixed: Tensor, state: HalfFields, force: Tensor | None, both: bool) -> Tensor:
        m, f = self.features(moving), self.features(fixed)
        u = self.direction(m, f, force)[0]
        return (u - self.direction(f, m, None if force is None else -force)[0]) / 4 if both else u / 2

    # ------------------------------------------------------------------------------------------ training

    def objective(
        self, moving: Tensor, fixed: Tensor, level: int | None = None, points: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """L_sim + 0.1 L_reg (+ landmarks), the mean over both directions.

        Args:
            points: (fixed, moving) landmarks, (N, P, 3) voxels; used when the switch ``landmark`` is not 0.
        """
        s = self.switches
        m, f = self.features(moving), self.features(fixed)
        u, _ = self.direction(m, f)
        ways = [(u, moving, fixed, points)]
        if s.symmetric:
            w, _ = self.direction(f, m)
            ways.append((w, fixed, moving, None if points is None else points[::-1]))
        terms: dict[str, list[Tensor]] = {"ncc": [], "ssim": [], "smooth": [], "folding": [], "landmark": []}
        for v, a, b, pair in ways:
            full = up_blocks(v, s.finest)
            moved = warp(a, full)
            terms["ncc"].append(ncc(moved, b))
            terms["ssim"].append(ssim(moved, b))
            terms["smooth"].append(0.1 * diffusion(full))
            terms["folding"].append(0.1 * negative_jacobian(full))
            if s.landmark and pair is not None:
                terms["landmark"].append(s.landmark * landmark_loss(full, *pair))
        if s.symmetric and s.consistency:
            loops = (compose(u, w), compose(w, u))
            terms["consistency"] = [s.consistency * c.square().sum(1).mean() for c in loops]
        return {name: sum(parts) / len(parts) for name, parts in terms.items() if parts}

    def mappings(
        self, moving: Tensor, fixed: Tensor, level: int | None = None
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        s, m, f = self.switches, self.features(moving), self.features(fixed)
        there = (up_blocks(self.direction(m, f)[0], s.finest), None)
        return [there, (None, up_blocks(self.direction(f, m)[0], s.finest))] if s.symmetric else [there]

    def parameter_groups(self, level: int) -> list[nn.Parameter]:
        """One stage: everything."""
        return list(self.parameters())


def landmark_loss(u: Tensor, fixed: Tensor, moving: Tensor) -> Tensor:
    """Huber loss of p_F + u(p_F) - p_M in units of ten voxels, the pull-back form of the paper's landmark term.

    Args:
        u: (N, 3, D, H, W) voxels. fixed, moving: (N, P, 3) voxel positions, array-axis order.
    """
    distance = (fixed.to(u) + sample_at(u, fixed) - moving.to(u)).square().sum(-1).add(1e-8).sqrt() / 10
    return F.smooth_l1_loss(distance, torch.zeros_like(distance))
