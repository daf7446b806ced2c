"""Speed and memory of the data path: augmentation of CIFAR-10-sized images, data in memory, data on disk.

    python benchmarks/data.py                      one core, random images of the size of CIFAR-10
    python benchmarks/data.py --device cuda --channels 64 --workers 8 --threads 8

Ours and a torchvision DataLoader that does the same with PIL are timed in turn, in one process; figures are medians
over the rounds, scaled to the 390 batches of an epoch. Memory is measured in a fresh process for each row. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

from robustflat.attacks.pgd import Pgd
from robustflat.data.augment import AutoAugment, Cutout, Flip, PadCrop
from robustflat.data.hdf5 import write_set
from robustflat.data.images import ImageSet
from robustflat.data.mixture import GeneratedImages, MixedStream
from robustflat.data.sources import Cifar10
from robustflat.geometry.input_ball import LinfBall
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.models.resnet import resnet18
from robustflat.rng import Streams, generator_for

BATCH = 128
EPOCH = 50_000 // BATCH
COLOUR = (125, 122, 113)
FILL = tuple(value / 255 for value in COLOUR)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
OURS: Mapping[str, Mapping[str, Any]] = {
    "pad-crop, flip": {"crop": PadCrop(padding=4), "flip": Flip()},
    "pad-crop, flip, AutoAugment, Cutout": {
        "crop": PadCrop(padding=4, fill=FILL),
        "flip": Flip(),
        "policy": AutoAugment(policy="cifar10", fill=FILL),
        "cutout": Cutout(size=16, fill=FILL),
    },
}
BOUNDS = {"pad-crop, flip": 0.02, "pad-crop, flip, AutoAugment, Cutout": 0.15}
"""Largest share of an adversarial training epoch that we promise."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times each is measured (default: 5)")
    parser.add_argument("--batches", type=int, default=20, help="batches of 128 per measurement (default: 20)")
    parser.add_argument("--steps", type=int, default=3, help="training steps measured (default: 3)")
    parser.add_argument("--channels", type=int, default=16, help="width of the ResNet-18 (default: 16; the paper: 64)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    parser.add_argument("--workers", type=int, default=0, help="worker processes of the DataLoader (default: 0)")
    parser.add_argument("--root", help="folder with cifar10/ (default: random images are made)")
    parser.add_argument("--extra", type=int, default=1_000_000, help="extra images on disk (default: 1,000,000)")
    parser.add_argument("--probe", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.probe:
        print(json.dumps(probe(*options.probe)))
        return
    print(f"{describe_machine(options)}\n\n{speed_table(options)}\n\n{memory_table(options)}")


def describe_machine(options: argparse.Namespace) -> str:
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    return (
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {name}, {options.threads} threads, "
        f"{options.workers} worker processes, batches of {BATCH}, {options.rounds} rounds of {options.batches} batches."
    )


# Speed


def speed_table(options: argparse.Namespace) -> str:
    images = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8, generator=generator_for(0, "images"))
    data = ImageSet(images, torch.arange(50_000) % 10, "random", 10).to(options.device)
    step = training_step_seconds(data, options)
    lines = [
        "| Augmentation | ours, s/epoch | torchvision, s/epoch | ratio | share of adversarial training | bound |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in OURS:
        ours, theirs = alternating(our_batches(data, name), their_batches(images, name, options.workers), options)
        lines.append(
            f"| {name} | {ours * EPOCH:.2f} | {theirs * EPOCH:.2f} | {theirs / ours:.1f} | "
            f"{ours / (ours + step):.2%} | {BOUNDS[name]:.0%} |"
        )
    lines.append(
        f"\nAdversarial training: ResNet-18 of width {options.channels} on {options.device}, PGD-7 and one SGD step, "
        f"{step:.3g} s per batch, {step * EPOCH:.0f} s per epoch."
    )
    return "\n".join(lines)


def training_step_seconds(data: ImageSet, options: argparse.Namespace) -> float:
    """Seconds of one step of adversarial training without its data, after one step to warm up."""
    model = resnet18(classes=10, channels=options.channels, mean=MEAN, std=STD).to(options.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loss, attack = CrossEntropy(), Pgd(LinfBall(8 / 255), steps=7, step_size=0.007)
    streams = Streams(0, options.device)
    batch = next(data.stream(BATCH, None, streams))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model, loss.craft(model, attack, batch, streams["attack"])).total.backward()
        optimizer.step()

    step()
    return median(seconds(step, options.device) for _ in range(options.steps))


def alternating(ours: Iterator[Any], theirs: Iterator[Any], options: argparse.Namespace) -> tuple[float, float]:
    """Median seconds per batch of two endless streams, measured in turn after a warm-up."""

    def draw(stream: Iterator[Any]) -> Callable[[], None]:
        def batches() -> None:
            for _ in range(options.batches):
                next(stream)

        return batches

    times: tuple[list[float], list[float]] = ([], [])
    for stream in (ours, theirs):
        next(stream)
    for _ in range(options.rounds):
        for stream, found in zip((ours, theirs), times, strict=True):
            found.append(seconds(draw(stream), options.device) / options.batches)
    return median(times[0]), median(times[1])


def seconds(run: Callable[[], None], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def our_batches(data: ImageSet, name: str) -> Iterator[Any]:
    return data.stream(BATCH, OURS[name], Streams(0, data.device))


def their_batches(images: Tensor, name: str, workers: int) -> Iterator[Any]:
    """Endless batches of a DataLoader that does the same to PIL images, as most training code does."""
    loader = DataLoader(
        PilImages(images, their_transform(name)),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


class PilImages(TorchDataset[tuple[Tensor, int]]):
    """Images as torchvision's own CIFAR-10 class gives them: an array, made a PIL image for each access."""

    def __init__(self, images: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.arrays[index])), index % 10


def their_transform(name: str) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    convert = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    if name == "pad-crop, flip":
        return v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *convert])
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=list(COLOUR))
    crop = v2.RandomCrop(32, padding=4, fill=COLOUR)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), policy, *convert, cover_square])


def cover_square(image: Tensor) -> Tensor:
    """Cutout of one image (3, 32, 32): 16 pixels around a random centre, the part beyond the border lost."""
    row, column = torch.randint(0, 32, (2,)).tolist()
    rows, columns = (slice(max(0, centre - 8), centre + 8) for centre in (row, column))
    image[:, rows, columns] = torch.tensor(FILL)[:, None, None]
    return image


# Memory


def memory_table(options: argparse.Namespace) -> str:
    if not Path("/proc/self/status").exists():
        return "Memory is measured on Linux only."
    lines = [
        "| Memory, MiB above a process that has imported everything | now | highest | of it pages of files |",
        "|---|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        root = options.root or make_cifar10(Path(temporary))
        extra = make_extra(Path(temporary), options.extra)
        size = extra.stat().st_size / 2**20
        rows = {
            "CIFAR-10, training and test set": ("resident", str(root), ""),
            f"one epoch mixed with {options.extra:,} images on disk ({size:.0f} MiB)": (
                "streamed",
                str(root),
                str(extra),
            ),
        }
        for name, arguments in rows.items():
            command = [sys.executable, __file__, "--threads", "1", "--probe", *arguments]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            lines.append(f"| {name} | {found['now']:.0f} | {found['highest']:.0f} | {found['files']:.0f} |")
    return "\n".join(lines)


def make_cifar10(root: Path) -> Path:
    for split, count in (("train", 50_000), ("test", 10_000)):
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator_for(0, split))
        write_set(root / "cifar10", split, ImageSet(images, torch.arange(count) % 10, split, 10))
    return root


def make_extra(root: Path, count: int) -> Path:
    """A file of `count` black images that takes no room on the disk where files may have holes."""
    shape = (count, 32, 32, 3)
    np.lib.format.open_memmap(root / "extra.npy", mode="w+", dtype=np.uint8, shape=shape).flush()
    np.save(root / "extra_labels.npy", np.arange(count) % 10)
    return root / "extra.npy"


def probe(what: str, root: str, extra: str) -> dict[str, float]:
    """Load (and stream) in this process; MiB above the start, now and at the highest."""
    next(ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), "", 10).stream(2, None, Streams(0)))
    start = resident()
    data = Cifar10(root)()
    highest = resident("VmHWM") - start
    files = resident("RssFile")
    if what == "streamed":
        labels = extra.replace("extra.npy", "extra_labels.npy")
        pool = GeneratedImages(extra, labels=labels, classes=10)()["train"]
        start, files = resident(), resident("RssFile")
        stream = MixedStream(data["train"], pool, batch_size=BATCH, fraction=0.7, augment=None, streams=Streams(0))
        highest = 0.0
        for _ in range(len(stream)):
            next(stream)
            highest = max(highest, resident() - start)
    return {"now": resident() - start, "highest": highest, "files": max(0.0, resident("RssFile") - files)}


def resident(entry: str = "VmRSS") -> float:
    """An entry of this process's memory statistics, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{entry}:"))


if __name__ == "__main__":
    main()
