"""SM-GICNet's pyramid and the networks of its four levels (see :mod:`SymRegistrationLib.networks.sm_gicnet`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._blocks import Conv3d, energy_map, in_full_precision


class Pyramid:
    """Low-pass images by scale (1, 2, 4, 8) and energy maps at 2 and 4 of one volume."""

    def __init__(self, image: Tensor):
        self.low = {1: image}
        for scale in (2, 4, 8):
            # The mean of a block is the orthonormal low-pass divided by 2^1.5.
            self.low[scale] = F.avg_pool3d(self.low[scale // 2], 2)
        self.energy = {2: energy_map(image), 4: energy_map(self.low[2])}


def weigh_difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both images times 0.5 + 0.5 d, d = ||a| - |b|| scaled to [0, 1] over the volume
    (AMNet's intensity difference)."""
    d = (a.abs() - b.abs()).abs()
    low, high = d.amin((2, 3, 4), keepdim=True), d.amax((2, 3, 4), keepdim=True)
    weight = 0.5 + 0.5 * (d - low) / (high - low).clamp_min(1e-6)
    return a * weight, b * weight


def _conv(a: int, b: int, size: int = 3, stride: int = 1) -> nn.Conv3d:
    return Conv3d(a, b, size, stride, size // 2, bias=False)


def _grow(c: int) -> nn.ConvTranspose3d:
    return nn.ConvTranspose3d(c, c, 2, 2, bias=False)


class Residual(nn.Module):
    """Two convolutions around a skip: pre-activated, LeakyReLU 0.2 (levels 1 to 3), or ``post``-activated,
    0.01 (level 4)."""

    def __init__(self, c: int, post: bool = False):
        super().__init__()
        self.a, self.b, self.post = _conv(c, c), _conv(c, c), post

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            return x + F.leaky_relu(self.b(F.leaky_relu(self.a(x))))
        return F.leaky_relu(x + self.b(F.leaky_relu(self.a(F.leaky_relu(x, 0.2)), 0.2)), 0.2)


class Head(nn.Module):
    """Two maps of one size -> three numbers per voxel in (-1, 1), float32."""

    def __init__(self, c: int):
        super().__init__()
        self.a, self.b = _conv(2 * c, c), _conv(c, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.softsign(in_full_precision(self.b, F.leaky_relu(self.a(torch.cat([x, y], 1)), 0.2)))


class Level1(nn.Module):
    """1/8: the low-pass pair alone."""

    def __init__(self, c: int):
        super().__init__()
        self.inlet, self.first, self.second = _conv(2, c), Residual(c), Residual(c)
        self.down, self.grow, self.skip, self.head = _conv(c, c, stride=2), _grow(c), _conv(c, c), Head(c)

    def forward(self, pair: Tensor, energy: Tensor | None, flow: Tensor) -> Tensor:
        f0 = self.first(self.inlet(pair))
        x = self.grow(self.second(self.first(self.down(f0))))
        return self.head(self.skip(self.skip(f0)), x)


class Level23(nn.Module):
    """1/4 (``depth`` 2) and 1/2 (``depth`` 3): image and energy branches, then a residual hourglass."""

    def __init__(self, c: int, depth: int):
        super().__init__()
        half = c // 2
        self.wide = depth == 3
        if self.wide:
            self.image, self.energy, self.narrow = _conv(5, c), _conv(5, c), _conv(c, half)
        else:
            self.image, self.energy = _conv(5, half), _conv(2, half)
        self.first = Residual(c)
        self.down = nn.ModuleList(nn.Sequential(_conv(c, c, stride=2), Residual(c)) for _ in range(depth))
        self.up = nn.ModuleList(nn.Sequential(Residual(c), _grow(c)) for _ in range(depth))
        self.skip, self.head = _conv(c, c), Head(c)

    def forward(self, pair: Tensor, energy: Tensor, flow: Tensor) -> Tensor:
        image = self.image(torch.cat([pair, flow], 1))
        if self.wide:
            image, energy = self.narrow(image), self.narrow(self.energy(torch.cat([energy, flow], 1)))
        else:
            energy = self.energy(energy)
        x = f0 = self.first(torch.cat([image, energy], 1))
        for step in (*self.down, *self.up):
            x = step(x)
        return self.head(self.skip(f0), x)


class _Gate(nn.Module):
    """Additive attention between an encoder map and the decoder map at half its size (Attention U-Net)."""

    def __init__(self, c: int, channels: int):
        super().__init__()
        self.encoder, self.decoder = Conv3d(c, c, 1), Conv3d(c, c, 1)
        self.psi = Conv3d(c, channels, 1)

    def forward(self, encoder: Tensor, decoder: Tensor) -> Tensor:
        """Weights in (0, 1) at the decoder's size."""
        e = F.interpolate(self.encoder(encoder), size=decoder.shape[2:], mode="trilinear", align_corners=True)
        return torch.sigmoid(self.psi(F.relu(e + self.decoder(decoder))))


class Level4(nn.Module):
    """1/1: a U-Net with attention gates; ``inlet`` is the number of image channels of the pair, ``turning`` that of
    the displacement so far and of the force."""

    def __init__(self, c: int, gate: str, inlet: int, turning: int = 3):
        super().__init__()
        self.kind = gate
        self.inlet = nn.Sequential(_conv(inlet + turning, c), nn.LeakyReLU(0.2), _conv(c, c))
        self.encode = nn.ModuleList(Residual(c, post=True) for _ in range(4))
        self.down = nn.ModuleList(_conv(c, c, stride=2) for _ in range(3))
        self.decode = nn.ModuleList(Residual(c, post=True) for _ in range(2))
        self.gates = nn.ModuleList(_Gate(c, c if gate == "code" else 1) for _ in range(0 if gate == "none" else 3))
        self.grow = nn.ModuleList(_grow(c) for _ in range(1 if gate == "code" else 3))
        self.merge = nn.ModuleList(_conv(2 * c, c, 1) for _ in range(0 if gate == "code" else 3))
        self.head = Head(c)

    def forward(self, pair: Tensor, energy: Tensor | None, flow: Tensor) -> Tensor:
        x = self.inlet(torch.cat([pair, flow], 1))
        maps = [self.encode[0](x)]
        for down, group in zip(self.down, self.encode[1:]):
            maps.append(group(down(maps[-1])))
        x = maps[3]
        for index, encoder in enumerate((maps[2], maps[1], maps[0])):
            x = self._decoded(index, encoder, x)
            # The last map goes straight into the head, beside the unreduced first one.
            x = self.decode[index](x) if index < 2 else x
        return self.head(x, maps[0])

    def _decoded(self, index: int, encoder: Tensor, x: Tensor) -> Tensor:
        """The decoder map ``x`` at the encoder map's size, gated."""
        if self.kind == "code":
            return self.grow[0](x * self.gates[index](encoder, x))
        if self.kind == "paper":
            weight = self.gates[index](encoder, x)
            encoder = encoder * F.interpolate(weight, size=encoder.shape[2:], mode="trilinear", align_corners=True)
        return self.merge[index](torch.cat([self.grow[index](x), encoder], 1))
