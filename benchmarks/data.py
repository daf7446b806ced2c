"""Speed and memory of the data path: augmentation of CIFAR-10-sized images, data in memory, data on disk.

    python benchmarks/data.py                      one core, random images of the size of CIFAR-10
    python benchmarks/data.py --device cuda --channels 64 --workers 8 --threads 8

Ours and a torchvision DataLoader that does the same with PIL are timed in turn, in one process, several batches at a
time; mean and deviation of the pixels that they give stand beside. Memory is measured in a fresh process for each row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

from benchmarks.harness import Report, Way, parser
from benchmarks.timing import in_turn
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
GOALS = {"pad-crop, flip": 6.0}
BOUNDS = {"pad-crop, flip": 0.02, "pad-crop, flip, AutoAugment, Cutout": 0.15}
"""Largest share of an adversarial training epoch that we promise."""


def options() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--images", type=int, default=50_000, help="training images (default: 50,000)")
    result.add_argument("--batches", type=int, default=20, help="batches of 128 per measurement (default: 20)")
    result.add_argument("--channels", type=int, default=16, help="width of the ResNet-18 (default: 16; the paper: 64)")
    result.add_argument("--workers", type=int, default=0, help="worker processes of the DataLoader (default: 0)")
    result.add_argument("--root", help="folder with cifar10/ (default: random images are made)")
    result.add_argument("--extra", type=int, default=1_000_000, help="extra images on disk (default: 1,000,000)")
    result.add_argument("--probe", nargs=3, help=argparse.SUPPRESS)
    return result


def main() -> None:
    given = options().parse_args()
    if given.probe:
        print(json.dumps(probe(*given.probe)))
        return
    report = Report(given)
    memory, report.memory = report.memory, False  # of streams: below, in processes of their own
    speed(report, given)
    if memory and Path("/proc/self/status").exists():
        report.figures(*memory_figures(given))


# Speed


def speed(report: Report, given: argparse.Namespace) -> None:
    """Both augmentations, and their share of adversarial training."""
    shape = (given.images, 3, 32, 32)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator_for(0, "images"))
    data = ImageSet(images, torch.arange(given.images) % 10, "random", 10).to(given.device)
    what = f"{given.batches} batches of {BATCH}, {given.workers} workers, {given.device}"
    shares: dict[str, dict[str, Any]] = {}
    step = training_step_seconds(data, given)
    for name in OURS:
        streams = {
            "torchvision, PIL in a DataLoader": their_batches(images, name, given.workers),
            "ours": data.stream(BATCH, OURS[name], Streams(0, data.device)),
        }
        ways = {way: Way(drawing(stream, given.batches)) for way, stream in streams.items()}
        ways["ours"] = Way(ways["ours"].run, goal=GOALS.get(name))
        work = (given.batches * BATCH, "images")
        rows = report.compare(f"Data path, {name}, {what}", ways, judge=pixels, work=work)
        ours = rows["ours"]["wall"] / given.batches
        share = ours / (ours + step)
        shares[name] = {
            "s per epoch": f"{ours * EPOCH:.2f}",
            "of adversarial training": f"{share:.2%}",
            "bound": f"{BOUNDS[name]:.0%}: {'kept' if share <= BOUNDS[name] else 'broken'}",
        }
    title = f"Data path, share of adversarial training: ResNet-18, {given.channels} channels, PGD-7, {given.device}"
    report.figures(title, {name: {"found": share} for name, share in shares.items()})


def training_step_seconds(data: ImageSet, given: argparse.Namespace) -> float:
    """Seconds of one step of adversarial training without its data."""
    model = resnet18(classes=10, channels=given.channels, mean=MEAN, std=STD).to(given.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loss, attack = CrossEntropy(), Pgd(LinfBall(8 / 255), steps=7, step_size=0.007)
    streams = Streams(0, given.device)
    batch = next(data.stream(BATCH, None, streams))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model, loss.craft(model, attack, batch, streams["attack"])).total.backward()
        optimizer.step()

    return in_turn({"step": step}, min(given.rounds, 3), device=given.device)["step"].wall


def drawing(stream: Iterator[Any], batches: int) -> Callable[[], Tensor]:
    """Draws batches of an endless stream; the images of the last one."""

    def draw() -> Tensor:
        for _ in range(batches):
            drawn = next(stream)
        images: Tensor = drawn[0]
        return images

    return draw


def pixels(found: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    return {
        name: {"mean of pixels": f"{float(x.mean()):.3f}", "deviation": f"{float(x.std()):.3f}"}
        for name, x in found.items()
    }


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


def memory_figures(given: argparse.Namespace) -> tuple[str, dict[str, dict[str, Any]]]:
    """MiB above a process that has imported everything: at the highest, now, and of it pages of files."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = given.root or make_cifar10(Path(temporary))
        extra = make_extra(Path(temporary), given.extra)
        size = extra.stat().st_size / 2**20
        streamed = f"one epoch mixed with {given.extra:,} images on disk ({size:.0f} MiB)"
        cases = {"CIFAR-10, training and test set": ("resident", str(root), "")}
        for name, arguments in (cases | {streamed: ("streamed", str(root), str(extra))}).items():
            command = [sys.executable, __file__, "--threads", "1", "--probe", *arguments]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            plain = {"MiB now": f"{found['now']:.0f}", "of it pages of files": f"{found['files']:.0f}"}
            rows[name] = {"memory_mib": found["highest"], "found": plain}
    return "Memory of the data path, MiB above a process that has imported everything", rows


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
