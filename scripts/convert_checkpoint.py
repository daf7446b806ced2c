"""Tensors out of a pickled checkpoint of another program, without running anything that the file asks for.

    python scripts/convert_checkpoint.py AT.pth.tar net.pt
    python evaluate.py checkpoint=net.pt model=resnet18 dataset=cifar10

Reads whole pickled modules, dictionaries with weights in them (state_dict, model, net, ...) and plain state dicts.
Classes named in the file become empty shells; functions other than torch's own rebuilding of tensors are not called.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

import torch

from robustflat.errors import UserError
from robustflat.models.pickled import state_dict_of


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, convert, say what was found; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--strip", default="", help="beginning of names to remove, such as 'module.'")
    given = parser.parse_args(arguments)
    try:
        if given.target.exists():
            raise UserError(f"{given.target} exists already: remove it or choose another name.")
        state = {name.removeprefix(given.strip): value for name, value in state_dict_of(given.source).items()}
        torch.save(state, given.target)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, value in state.items():
        print(f"  {name:<50} {str(value.dtype).removeprefix('torch.'):<10} {tuple(value.shape)}")
    print(f"{given.target}: {len(state)} tensors, {sum(v.numel() for v in state.values()):,} numbers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
