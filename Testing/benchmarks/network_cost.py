"""What each network costs: parameters, multiply-adds, seconds, peak memory, beside the floor that the machine allows.

    python Testing/benchmarks/network_cost.py                       both sizes of every method at 128^3 and 160x192x224
    python Testing/benchmarks/network_cost.py --shapes 64x64x64 --sizes small --methods hsyn --repeats 1

Each row is measured in a fresh process, so that peak memory is its own. The floor is the larger of (multiply-adds) /
(measured matrix-product rate) and (bytes of weights and one pass over every convolution's input and output) / (measured
copy rate): no program of these layers can be faster on this machine in this precision.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from SymRegistrationLib import networks
from SymRegistrationLib.networks._base import parameter_count
from SymRegistrationLib.registration import devices, inference

COLUMNS = (
    "method",
    "size",
    "shape",
    "device",
    "precision",
    "M params",
    "G mul-add",
    "seconds",
    "floor s",
    "x floor",
    "GB",
    "bytes/voxel",
)


def clock(work, device: torch.device, repeats: int) -> float:
    """Best wall time of ``work()`` in seconds."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Rates of this machine: matrix products in multiply-adds per second, copies in bytes per second (read + write)."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    long = torch.zeros(64 << 20, device=device)
    other = torch.empty_like(long)
    for work in (lambda: a @ b, lambda: other.copy_(long)):
        work()
    return {
        "mac": n**3 / clock(lambda: a @ b, device, 5),
        "bytes": 2 * long.nbytes / clock(lambda: other.copy_(long), device, 5),
    }


def traffic(network: nn.Module, images, element: int) -> float:
    """Bytes of one pass over the inputs, outputs and weights of every layer with weights."""
    total = 0

    def add(layer, inputs, output) -> None:
        nonlocal total
        total += element * (
            sum(x.numel() for x in inputs if torch.is_tensor(x)) + output.numel() + parameter_count(layer)
        )

    layers = [m for m in network.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d, nn.Linear))]
    handles = [layer.register_forward_hook(add) for layer in layers]
    network(*images)
    for handle in handles:
        handle.remove()
    return total


@torch.no_grad()
def row(method: str, size: str, shape: tuple[int, ...], device: torch.device, repeats: int) -> dict:
    """One measurement; call it in a fresh process."""
    network = inference._placed(networks.create(method, size), device).requires_grad_(False)
    precision = inference._precision(device, network.card)
    with precision:
        enabled = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if enabled else torch.float32
    rates = machine(device, dtype)
    least = network.card.minimum_size
    count = torch.Generator().manual_seed(0)
    small = [torch.rand(1, 1, least, least, least, generator=count).to(device) for _ in range(2)]
    images = [torch.rand(1, 1, *shape, generator=count).to(device) for _ in range(2)]
    with precision:
        network(*small)
        before = start_memory(device)
        seconds = clock(lambda: network(*images), device, repeats)
        peak = peak_memory(device) - before
        with FlopCounterMode(display=False) as counter:
            network(*images)
        moved = traffic(network, images, torch.empty(0, dtype=dtype).element_size())
    mac = counter.get_total_flops() / 2
    voxels = shape[0] * shape[1] * shape[2]
    floor = max(mac / rates["mac"], moved / rates["bytes"])
    return dict(
        zip(
            COLUMNS,
            (
                method,
                size,
                "x".join(map(str, shape)),
                device.type,
                str(dtype)[6:],
                round(parameter_count(network) / 1e6, 3),
                round(mac / 1e9, 1),
                round(seconds, 3),
                round(floor, 3),
                round(seconds / floor, 1),
                round(peak / 1e9, 3),
                round(peak / voxels),
            ),
        )
    ) | {"rates": {"gemm GFLOP/s": round(2 * rates["mac"] / 1e9), "copy GB/s": round(rates["bytes"] / 1e9, 1)}}


def start_memory(device: torch.device) -> int:
    """Bytes in use now; the peak counter begins here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return devices.psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes since :func:`start_memory`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(devices.peak_memory_gb() * 1e9)


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(r[c]) for c in COLUMNS) + " |" for r in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=networks.names())
    parser.add_argument("--sizes", nargs="*", default=["small", "published"])
    parser.add_argument("--shapes", nargs="*", default=["128x128x128", "160x192x224"])
    parser.add_argument("--devices", nargs="*", default=[r["name"] for r in devices.listing()])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", action="store_true", help="measure the first of each list here and print JSON")
    options = parser.parse_args()
    if options.one:
        shape = tuple(int(n) for n in options.shapes[0].split("x"))
        print(
            json.dumps(
                row(options.methods[0], options.sizes[0], shape, devices.resolve(options.devices[0]), options.repeats)
            )
        )
        return
    rows = []
    for device in options.devices:
        for shape in options.shapes:
            for method in options.methods:
                for size in options.sizes:
                    rows += _fresh(method, size, shape, device, options.repeats)
    print(table(rows))


def _fresh(method: str, size: str, shape: str, device: str, repeats: int) -> list[dict]:
    """The row from a process of its own; [] with the reason on stderr when it failed (too little memory, for one)."""
    command = [
        sys.executable,
        __file__,
        "--one",
        "--methods",
        method,
        "--sizes",
        size,
        "--shapes",
        shape,
        "--devices",
        device,
        "--repeats",
        str(repeats),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        print(f"{method} {size} {shape} {device}: {last[0]}", file=sys.stderr)
        return []
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{method} {size} {shape} {device}: {found['seconds']} s; machine {found['rates']}", file=sys.stderr, flush=True
    )
    return [found]


if __name__ == "__main__":
    main()
