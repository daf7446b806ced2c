"""Download public data sets, convert them to the HDF5 layout and verify the result.

    python scripts/prepare_data.py cifar10 mnist --root data
    python scripts/prepare_data.py dataset=cifar10
    python scripts/prepare_data.py tinyimages500k --root data --pickle 500k_pseudolabeled.pickle

What is finished is kept: after an interruption, the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from robustflat.data.downloads import convert_pseudo_labelled
from robustflat.data.hdf5 import write_set
from robustflat.data.images import channel_statistics
from robustflat.data.sources import (
    Cifar10,
    Cifar100,
    FashionMnist,
    Mnist,
    StoredSource,
    Svhn,
    TinyImages500k,
)
from robustflat.errors import UserError

SOURCES: dict[str, type[StoredSource]] = {
    source.name: source for source in (Cifar10, Cifar100, Svhn, Mnist, FashionMnist, TinyImages500k)
}


def prepare(name: str, root: str, pickled: Path | None) -> str:
    """Make one data set available under `root` and describe what is there.

    Raises:
        UserError: if it cannot be downloaded, converted or read back.
    """
    source = SOURCES[name](root)
    if source.folder() is None and name == TinyImages500k.name and pickled is not None:
        write_set(source.root / name, "train", convert_pseudo_labelled(pickled))
    if source.folder() is None:
        source.prepare()
    lines = [f"{name}: {source.folder()}"]
    for data in source().values():
        mean, std = ([round(v, 4) for v in values] for values in channel_statistics(data))
        counts = data.class_counts()
        lines.append(
            f"  {data.name}: {len(data)} images {data.image_shape}, {int(counts.min())}-{int(counts.max())} per "
            f"class, mean {mean}, std {std}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare every data set named on the command line; the exit code is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names",
        nargs="+",
        type=lambda text: text.removeprefix("dataset="),  # as the other commands spell it
        choices=sorted(SOURCES),
        metavar="NAME",
        help=f"{', '.join(SOURCES)}; dataset=NAME is the same",
    )
    parser.add_argument("--root", default="data", help="folder that holds the data sets (default: data)")
    parser.add_argument("--pickle", type=Path, help="500k_pseudolabeled.pickle, for tinyimages500k")
    options = parser.parse_args(arguments)
    failed = 0
    for name in options.names:
        try:
            print(prepare(name, options.root, options.pickle), flush=True)
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = 1
    return failed
