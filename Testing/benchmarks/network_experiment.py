"""Do a network's own levels earn their place? Ways of taking the same passes, trained for the same number of steps.

    python Testing/benchmarks/network_experiment.py --pool POOL --judge PAIRS.csv --work FOLDER
        [--steps 300] [--pairs 24]

``images`` is a small U-Net (HSyN's finest level) that sees both scans in their mean frame, ``images+force`` sees the
gradient of the local correlation as well, ``begun`` is the same with weights that begin as a plain step along the
force, and ``gain`` is that force times one trainable number: a classical step without a network. All learn on blocks of
the same pairs by local correlation, diffusion and soft Dice, take one to four passes in training, the state detached
between them, and are judged on real pairs after 1 to 6 passes: Dice of 29 labels at every second voxel of the fixed
scan, behind the shipped pose and matching, 2 mm working voxel. POOL is made by ``symreg pool``; PAIRS.csv has the
columns fixed, moving, fixed_labels and moving_labels. What is finished in FOLDER is not computed again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from SymRegistrationLib.fields import jacobian_determinant
from SymRegistrationLib.networks._blocks import space_to_depth
from SymRegistrationLib.networks._passes import GAIN, begin_as_step, both_orders, no_motion, similarity_force
from SymRegistrationLib.networks.hsyn import _Switches, _UNet
from SymRegistrationLib.training.judging import JudgedPair, judged_pairs
from SymRegistrationLib.training.pool import Pool
from SymRegistrationLib.training.pool_loss import blocked, brightened, free_terms, indicators, turned
from SymRegistrationLib.training.pool_making import prealignment
from SymRegistrationLib.training.synthetic import Draw

KINDS = ("gain", "images", "images+force", "begun")
BLOCK, PASSES, RATE, COLD = (48, 64, 48), 4, 5e-4, 0.05


class Step(nn.Module):
    """One pass: the half-way velocity in cells, odd under exchange of the scans when both orders are asked for."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        if kind == "gain":
            self.gain = nn.Parameter(torch.tensor(GAIN))
            return
        switches = _Switches(encoder=(16, 32, 48), decoder=(48, 32, 32), tail=(16, 16), finest=2)
        self.net = _UNet(16 if kind == "images" else 19, switches)
        if kind == "begun":
            begin_as_step([self.net.down[0], *self.net.tail, self.net.heads[0]], 16, [32, 0, 0])

    def forward(self, moving: Tensor, fixed: Tensor, both: bool) -> Tensor:
        force = () if self.kind == "images" else (similarity_force(moving, fixed),)
        if self.kind == "gain":
            return self.gain * force[0]
        return both_orders(lambda x: self.net(x)[0], space_to_depth(moving), space_to_depth(fixed), force, both)


def train(kind: str, pool: Pool, args: argparse.Namespace) -> tuple[Step, dict]:
    """A step trained for ``--steps``."""
    torch.manual_seed(args.seed)
    step, begun, losses, pairs = Step(kind), time.process_time(), [], 0
    peak = 1e-2 if kind == "gain" else RATE
    optimiser = torch.optim.Adam(step.parameters(), lr=peak)
    while len(losses) < args.steps:
        draw = Draw(args.seed * 1_000_003 + pairs)
        number = draw.integer(0, min(len(pool), args.pairs) - 1)
        pair = turned(pool.pair(number), draw.chance(0.5), draw.chance(0.5))
        pair, state = blocked(pair, no_motion(pair.moving), BLOCK, draw)
        pair = brightened(pair, draw)
        hot, pairs = indicators(pair), pairs + 1
        for _ in range(draw.integer(1, PASSES)):
            along = min(1.0, len(losses) / args.steps)
            optimiser.param_groups[0]["lr"] = peak * (COLD + (1 - COLD) * 0.5 * (1 + np.cos(np.pi * along)))
            state = state.detached()
            state = state.advanced(step(*state.warped(pair.moving, pair.fixed), both=False))
            loss = sum(free_terms(state, pair, hot, 0.1).values())
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(step.parameters(), 1.0)
            optimiser.step()
            losses.append(float(loss.detach()))
    facts = {"pairs_seen": pairs, "steps": len(losses), "cpu_seconds": round(time.process_time() - begun)}
    facts |= {"loss": round(float(np.mean(losses[-100:])), 4), "parameters": sum(p.numel() for p in step.parameters())}
    return step, facts | ({"gain_cells": round(float(step.gain.detach()), 4)} if kind == "gain" else {})


@torch.no_grad()
def judge(step: Step, pairs: list[JudgedPair]) -> dict:
    """Dice and share of folded voxels after 0, 1, 2, 4 and 6 passes per pair."""
    rows: dict = {}
    for pair in pairs:
        state, rows[pair.name] = no_motion(pair.moving), {}
        for number in range(7):
            if number in (0, 1, 2, 4, 6):
                u = state.full()[0]
                folded = float((jacobian_determinant(u) <= 0).float().mean())
                rows[pair.name][number] = {"dice": round(pair.dice(u), 4), "folded": folded}
            state = state.advanced(step(*state.warped(pair.moving, pair.fixed), both=True))
    return rows


def main() -> int:
    """Train and judge what FOLDER does not hold yet; print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--judge", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    judged, pool = judged_pairs(args.judge, prealignment("sm-gicnet")[0], 2.0), Pool(args.pool)
    for kind in args.kinds:
        file = args.work / f"{kind}.json"
        if not file.is_file():
            step, facts = train(kind, pool, args)
            file.write_text(json.dumps({**facts, "judged": judge(step, judged)}, indent=1))
        found = json.loads(file.read_text())
        means = {n: np.mean([row[n]["dice"] for row in found["judged"].values()]) for n in ("0", "1", "2", "4", "6")}
        print(kind, found["steps"], {n: round(float(v), 4) for n, v in means.items()}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
