r"""A checkpoint of another program as one that evaluate.py takes, without running anything that the file asks for.

Only the tensors, by their names (for a network whose configuration you write yourself):

    python scripts/convert_checkpoint.py AT.pth.tar net.pt
    python evaluate.py checkpoint=net.pt model=resnet18 dataset=cifar10

With a layout the names become ours, and the file says which network it holds. Options about the network, such as
--check and --model, imply --layout auto:

    python scripts/convert_checkpoint.py classifier.pth.tar net.pt --layout released --check dataset=cifar10
    python scripts/convert_checkpoint.py resnet18.pth net.pt --layout torchvision --architecture resnet18 \
        --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225
    python scripts/convert_checkpoint.py model.safetensors net.pt --layout timm --architecture vit_tiny_patch16_224
    python scripts/convert_checkpoint.py Wong2020Fast.pt net.pt --layout robustbench --architecture Wong2020Fast \
        --check dataset=cifar10 --expected 0.8334
    python scripts/convert_checkpoint.py package net.pt --layout robustbench --architecture Wong2020Fast
    python scripts/convert_checkpoint.py weights.pt net.pt --layout plain \
        --model resnet18 model.channels=16 dataset=cifar10
    python evaluate.py checkpoint=net.pt dataset=cifar10

Reads whole pickled modules, dictionaries with weights in them (state_dict, model, net, ...), plain state dicts and
.safetensors. Classes named in the file become empty shells; functions other than torch's own rebuilding of tensors are
not called. With --check the converted network must classify: its clean accuracy on the test split is printed, and must
agree with --expected (a fraction), or nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

import torch

from robustflat.apps.convert import (
    LAYOUTS,
    Request,
    clean_accuracy,
    convert,
    model_yaml,
    renamed,
    write,
)
from robustflat.errors import UserError
from robustflat.evaluation.accuracy import Accuracy, require_agreement
from robustflat.models.external import BENCHMARKS, THREAT_MODELS
from robustflat.models.pickled import state_dict_of


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, convert, say what was found; the exit code."""
    given = _parser().parse_args(arguments)
    try:
        if given.target.exists():
            raise UserError(f"{given.target} exists already: remove it or choose another name.")
        about_a_network = (given.check, given.expected, given.architecture, given.classes, given.mean, given.std)
        if given.layout is None and (given.model or any(value is not None for value in about_a_network)):
            given.layout = "auto"  # tensors alone could not answer
        if given.layout is None:
            _tensors_only(given)
        else:
            _network(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="file, or 'package': RobustBench's package fetches it by name")
    parser.add_argument("target", type=Path)
    layout = "default: tensors only, names as they are; auto where an option is about the network"
    parser.add_argument("--layout", choices=LAYOUTS, help=layout)
    parser.add_argument("--architecture", help="its name in torchvision, timm or RobustBench")
    parser.add_argument(
        "--model", nargs="+", default=[], metavar="CHOICE", help="for plain: resnet18 model.norm=rebn dataset=..."
    )
    parser.add_argument("--classes", type=int, help="of torchvision's and timm's; default: as the file has")
    parser.add_argument("--mean", nargs="+", type=float, help="of each channel, in [0, 1] units")
    parser.add_argument("--std", nargs="+", type=float)
    parser.add_argument("--benchmark", default="cifar10", choices=list(BENCHMARKS), help="of RobustBench")
    parser.add_argument("--threat-model", default="Linf", choices=THREAT_MODELS, help="of RobustBench")
    parser.add_argument("--folder", default="models", help="where RobustBench's package keeps its downloads")
    parser.add_argument("--part", help="key of the file under which the network is, such as ema or last")
    parser.add_argument("--strip", default="", help="beginning of names to remove where it is, such as 'module.'")
    parser.add_argument("--rename", nargs="*", default=[], metavar="OLD=NEW", help="beginnings of names to replace")
    parser.add_argument("--drop", nargs="*", default=[], help="beginnings of names to leave out")
    parser.add_argument("--check", nargs="+", metavar="KEY=VALUE", help="self-check on this data: dataset=cifar10 ...")
    parser.add_argument("--expected", type=float, help="clean accuracy that the self-check must find, in [0, 1]")
    parser.add_argument("--tolerance", type=float, help="largest difference; default: a 99 %% interval must agree")
    return parser


def _renames(given: argparse.Namespace) -> list[tuple[str, str]]:
    """Pairs out of --rename and --strip.

    Raises:
        UserError: for an entry without "=".
    """
    wrong = [text for text in given.rename if "=" not in text]
    if wrong:
        raise UserError(f"--rename takes OLD=NEW, got {wrong[0]}.")
    return [(text.partition("=")[0], text.partition("=")[2]) for text in given.rename]


def _model(given: argparse.Namespace) -> list[str]:
    """What --model says, for the data of --check if it names none."""
    data = [text for text in given.check or () if text.startswith("dataset=")]
    named = any(text.startswith("dataset=") for text in given.model)
    return [*given.model, *(data if given.model and not named else [])]


def _tensors_only(given: argparse.Namespace) -> None:
    state = state_dict_of(given.source, part=given.part)
    state = renamed({name.removeprefix(given.strip): v for name, v in state.items()}, _renames(given), given.drop)
    torch.save(state, given.target)
    for name, value in state.items():
        print(f"  {name:<50} {str(value.dtype).removeprefix('torch.'):<10} {tuple(value.shape)}")
    print(f"{given.target}: {len(state)} tensors, {sum(v.numel() for v in state.values()):,} numbers")


def _network(given: argparse.Namespace) -> None:
    if given.expected is not None and given.check is None:
        raise UserError("--expected needs --check dataset=<choice>, on which it is compared.")
    request = Request(
        source=given.source,
        layout=given.layout,
        architecture=given.architecture,
        model=_model(given),
        classes=given.classes,
        mean=given.mean,
        std=given.std,
        benchmark=given.benchmark,
        threat_model=given.threat_model,
        folder=given.folder,
        part=given.part,
        rename=[*([(given.strip, "")] if given.strip else []), *_renames(given)],
        drop=given.drop,
    )
    conversion, model = convert(request)
    print(f"layout {conversion.layout}\n{model_yaml(conversion)}", end="")
    for note in conversion.notes:
        print(f"note: {note}")
    accuracy: Accuracy | None = None
    if given.check is not None:
        accuracy = clean_accuracy(model, given.check)
        print(f"self-check: {accuracy}")
        if given.expected is not None:
            require_agreement(accuracy, given.expected, given.tolerance)
            print(f"self-check: agrees with the expected {given.expected:.4f}")
    write(given.target, conversion, request, accuracy=accuracy, expected=given.expected)
    numbers = sum(value.numel() for value in conversion.weights.values())
    print(f"{given.target}: {len(conversion.weights)} tensors, {numbers:,} numbers")
    if accuracy is None:
        print("Not checked: --check dataset=<choice> tells the clean accuracy.")
    print(f"python evaluate.py checkpoint={given.target} dataset=<choice>")


if __name__ == "__main__":
    sys.exit(main())
