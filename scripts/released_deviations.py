r"""What difference each deviation of the released code of Stutz et al. (ICCV 2021) makes, one pair of trainings each.

    python scripts/released_deviations.py dataset=cifar10 data_root=data --output outputs/deviations
    python scripts/released_deviations.py dataset=cifar10 data_root=data --only trades_selection swapped_shares \
        --steps 200 --channels 16 --seeds 0 1 2

Trains a narrow ResNet-18 adversarially for a few hundred steps. The two trainings of a pair differ in one setting only
(`Setup` in released_behaviour.py) and start from the same weights; `control` differs in the seed of the attack, so in
nothing that matters: a difference not larger than its own is none. Prints RErr and RLoss (PGD on held-out images),
clean error, and the distance of the final weights. Goes on where it was interrupted: trainings in the output folder are
not repeated, and one that several pairs share is done once.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

import pandas as pd
import torch

from robustflat.apps.config import digest
from robustflat.apps.convert import dataset_of
from robustflat.apps.run_folder import write_text
from robustflat.attacks.pgd import Pgd
from robustflat.data.dataset import Dataset
from robustflat.data.images import BatchStream
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.evaluation import metrics
from robustflat.evaluation.predict import predict
from robustflat.geometry.input_ball import LinfBall
from robustflat.loggers.base import Null
from robustflat.rng import Streams, derived_seed, generator_for
from robustflat.store.tables import as_text
from robustflat.training.checkpoint import load, save
from robustflat.training.trainer import Trainer
from robustflat.types import Batch
from scripts import released_behaviour as behaviour
from scripts.released_behaviour import Setup

EPOCHS = 4
"""Parts that a training counts as epochs; one peculiarity happens once in each."""

METRICS = {"robust_error": "RErr", "robust_loss": "RLoss", "clean_error": "clean error"}


@dataclass(frozen=True)
class Pair:
    """Two trainings that differ in one setting: as the paper (or its source) has it, and as the released code does."""

    text: str
    corrected: Setup
    released: Setup

    def setting(self) -> str:
        """What differs: "name: corrected -> released"."""
        one, other = asdict(self.corrected), asdict(self.released)
        (name,) = [key for key in one if one[key] != other[key]]
        return f"{name}: {one[name]} -> {other[name]}"


def _pair(text: str, setting: dict[str, object], **shared: object) -> Pair:
    """Both setups have `shared`; `setting` is {name: (corrected, released)}."""
    known = {field.name for field in fields(Setup)}
    assert {*setting, *shared} <= known
    sides = [{name: values[i] for name, values in setting.items()} for i in (0, 1)]  # type: ignore[index]
    return Pair(text, *(Setup(**{**shared, **side}) for side in sides))  # type: ignore[arg-type]


PAIRS = {
    "control": _pair("none: another seed of the attack", {"attack_seed": (0, 1)}),
    "epsilon": _pair("radius 0.0314 for 8/255", {"epsilon": (8.0, 0.0314 * 255)}),
    "start": _pair("PGD starts at a uniform norm, close to the image", {"start": ("uniform", "uniform_norm")}),
    "augmentation": _pair("padded images are resized, not cropped", {"augment": ("crop", "resize")}),
    "zero_residuals": _pair("zero_residuals does nothing with rebn", {"zero_residuals": (True, False)}),
    "swapped_shares": _pair("loss shares swapped (a quarter attacked)", {"shares": ("own", "swapped")}, fraction=0.25),
    "predicted_labels": _pair("prediction in train mode", {"labels": ("eval", "train")}),
    "only_correct": _pair("misclassified ones found in train mode", {"only_correct": ("eval", "train")}),
    "smoothing_target": _pair("tau/K on all classes", {"smoothing_target": ("paper", "uniform")}, smoothing=0.3),
    "gelu": _pair("exact GELU", {"activation": ("gelu_sigmoid", "gelu")}),
    "trades_selection": _pair(
        "best iterate per batch", {"best_iterate": ("per_example", "per_batch")}, loss="trades"
    ),
    "awp": _pair("AWP's step is lost, gradient entries clipped", {"gradient": ("awp", "clipped")}),
    "entropy_sgd_schedule": _pair(
        "Entropy-SGD ignores the schedule", {"schedule": ("multistep", "constant")}, gradient="entropy_sgd"
    ),
    "entropy_sgd_momentum": _pair("Entropy-SGD without momentum", {"momentum": (0.9, 0.0)}, gradient="entropy_sgd"),
    "entropy_sgd_scoping": _pair("gamma never grows", {"gamma_growth": (1e-3, 0.0)}, gradient="entropy_sgd"),
    "entropy_sgd_batches": _pair(
        "one batch more per step, only logged", {"extra_batch": (False, True)}, gradient="entropy_sgd"
    ),
    "ssl_half_clean": _pair("half of the batch stays clean", {"fraction": (1.0, 0.5)}, loss="rotation"),
    "ssl_clamp": _pair("features clamped before the head", {"head_clamp": (False, True)}, loss="rotation"),
    "clipping_norms": _pair("batch norm clipped too", {"clip_norms": (False, True)}, clip=0.08),
    "clipping_time": _pair(
        "clipped before scoring, not after the step", {"clip_when": ("after_step", "before_scoring")}, clip=0.08
    ),
    "averaging_statistics": _pair(
        "batch-norm statistics of the last weights", {"average_statistics": ("average", "copy")}, average=0.98
    ),
    "averaging_twice": _pair("one update more per epoch", {"average_twice": (False, True)}, average=0.98),
    "cyclic": _pair("always one cycle", {"cycles": (4, 1)}, schedule="cyclic"),
}  # fmt: skip

NOT_SHOWN = (
    "Not shown, as nothing differs or other data are needed: label noise (uniform over all K classes in both), 70 % "
    "instead of 50 % extra images (500k pseudo-labelled images), AutoAugment on rotated data, hard-coded parameters "
    "of the registry (weight decay, averaging), an average lost on resume."
)


class CountedSteps:
    """A training stream of which a given number of steps counts as an epoch."""

    def __init__(self, stream: BatchStream, steps: int) -> None:
        self.stream, self.steps = stream, steps
        self.state_dict, self.load_state_dict = stream.state_dict, stream.load_state_dict

    def __len__(self) -> int:
        return self.steps

    def __next__(self) -> Batch:
        return next(self.stream)


@dataclass(frozen=True)
class Protocol:
    """What all trainings and evaluations share."""

    steps: int
    channels: int
    batch_size: int
    attack_steps: int
    evaluation_steps: int
    test: int
    data: str


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, train what is missing, print the table; the exit code."""
    given = _parser().parse_args(arguments)
    try:
        print(run(given))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on with the trainings that are missing.", file=sys.stderr)
        return 130
    return 0


def run(given: argparse.Namespace) -> str:
    """Everything that one command asks for; the report as Markdown.

    Raises:
        UserError: for an unknown pair, a number out of range, or data that cannot be loaded.
    """
    for name in given.only or ():
        require_one_of("--only", name, PAIRS)
    for name in ("steps", "channels", "batch_size", "attack_steps", "evaluation_steps", "test"):
        require_range(f"--{name.replace('_', '-')}", getattr(given, name), low=EPOCHS if name == "steps" else 1)
    if given.threads:
        torch.set_num_threads(given.threads)
    dataset = dataset_of(given.data)
    protocol = Protocol(
        steps=EPOCHS * math.ceil(given.steps / EPOCHS),
        channels=given.channels,
        batch_size=given.batch_size,
        attack_steps=given.attack_steps,
        evaluation_steps=given.evaluation_steps,
        test=min(given.test, len(dataset.test)),
        data=f"{dataset.name} {dataset.train_split} ({len(dataset.train)})",
    )
    done: dict[str, list[dict[str, float]]] = {}
    for name in given.only or PAIRS:
        pair = PAIRS[name]
        done[name] = []
        for seed in given.seeds:
            sides = [trained(setup, seed, protocol, dataset, given.output) for setup in (pair.corrected, pair.released)]
            done[name].append(compared(*sides))
        write_text(given.output / "report.md", report(done, protocol, given.seeds, dataset))
    return report(done, protocol, given.seeds, dataset)


def trained(setup: Setup, seed: int, protocol: Protocol, dataset: Dataset, output: Path) -> Path:
    """Folder of a training: its figures (result.json) and final weights (weights.pt); done only if they are missing."""
    values = {"setup": asdict(setup), "protocol": asdict(protocol), "seed": seed}
    folder = output / "trainings" / digest(values)
    if (folder / "result.json").is_file():
        return folder
    begin = time.perf_counter()
    trainer = make_trainer(setup, seed, protocol, dataset)
    trainer.fit()
    model = trainer.networks()["average" if setup.average else "model"].eval()
    test = dataset.test.subset(slice(0, protocol.test)).batches(dataset.eval_batch_size)
    attack = Pgd(LinfBall(8 / 255), steps=protocol.evaluation_steps, step_size=0.007)
    clean = predict(model, test)
    attacked = predict(model, test, attack=attack, generator=generator_for(seed, "evaluation", device=dataset.device))
    result = {
        "robust_error": metrics.robust_error(clean.logits, attacked.logits, clean.labels),
        "robust_loss": metrics.robust_loss(attacked.logits, clean.labels),
        "clean_error": metrics.error(*clean),
        "seconds": time.perf_counter() - begin,
    }
    save(folder / "weights.pt", {"model": model.state_dict()}, values)
    write_text(folder / "result.json", json.dumps(result | values, indent=1))
    print(f"{folder.name} seed {seed}: RErr {result['robust_error']:.3f}, {result['seconds']:.0f} s", file=sys.stderr)
    return folder


def make_trainer(setup: Setup, seed: int, protocol: Protocol, dataset: Dataset) -> Trainer:
    """The trainer of a setup; initial weights, order and augmentation of the images depend on the seed only."""
    torch.manual_seed(derived_seed(seed, "model"))
    channels = protocol.channels
    model = behaviour.network(setup, channels=channels, mean=dataset.mean, std=dataset.std, classes=dataset.classes).to(
        dataset.device
    )
    streams = Streams(seed, dataset.device)
    if setup.attack_seed:
        streams["attack"].manual_seed(derived_seed(seed, "attack", setup.attack_seed))
    stream = BatchStream(
        dataset.train, batch_size=protocol.batch_size, augment=behaviour.augmentations(setup), streams=streams
    )
    return Trainer(
        model=model,
        data=CountedSteps(stream, protocol.steps // EPOCHS),
        loss=behaviour.loss(setup),
        attack=behaviour.attack(setup, protocol.attack_steps),
        gradient=behaviour.gradient(setup),
        make_optimizer=behaviour.optimizer(setup),
        make_schedule=behaviour.schedule(setup),
        epochs=EPOCHS,
        logger=Null(),
        streams=streams,
        callbacks=behaviour.callbacks(setup, channels),
    )


def compared(corrected: Path, released: Path) -> dict[str, float]:
    """Figures of the corrected training, differences (released - corrected), and the relative distance of weights."""
    one, other = (json.loads((folder / "result.json").read_text()) for folder in (corrected, released))
    values = {name: one[name] for name in METRICS} | {f"d_{name}": other[name] - one[name] for name in METRICS}
    w, v = (load(folder / "weights.pt").parts["model"] for folder in (corrected, released))
    shared = [n for n in w if n in v and not n.startswith("auxiliary.") and not n.endswith(("mean", "var", "tracked"))]
    distance = sum(float((w[n].double() - v[n].double()).square().sum()) for n in shared)
    size = sum(float(w[n].double().square().sum()) for n in shared)
    return values | {"distance": math.sqrt(distance / size)}


def report(done: dict[str, list[dict[str, float]]], protocol: Protocol, seeds: list[int], dataset: Dataset) -> str:
    """Markdown: what was measured how, and one line per pair."""
    rows = [{"pair": name, "released code": PAIRS[name].text, **_cells(values)} for name, values in done.items()]
    spread = "mean +- standard error over seeds" if len(seeds) > 1 else "one seed: no standard error"
    settings = "\n".join(f"* {name}: `{PAIRS[name].setting()}`" for name in done)
    return (
        f"# Deviations of the released code\n\nAT on {protocol.data}: ResNet-18, {protocol.channels} channels, "
        f"{protocol.steps} steps of {protocol.batch_size} images, PGD-{protocol.attack_steps}, epsilon 8/255. "
        f"Evaluated on {protocol.test} images of {dataset.test_split}: PGD-{protocol.evaluation_steps}, one start, "
        f"float32. Seeds {', '.join(map(str, seeds))}; {spread}. Differences are released - corrected, paired by seed; "
        "`weights` is the distance of the final weights over their norm. Compare with `control`.\n\n"
        f"{as_text(pd.DataFrame(rows), 'md')}\n{settings}\n\n{NOT_SHOWN}\n"
    )


def _cells(values: list[dict[str, float]]) -> dict[str, str]:
    """Columns of one line."""
    cells = {}
    for name, short in METRICS.items():
        cells[short] = _mean(values, name, "{:.3f}")
        cells[f"d {short}"] = _mean(values, f"d_{name}", "{:+.3f}")
    return cells | {"weights": _mean(values, "distance", "{:.2f}")}


def _mean(values: list[dict[str, float]], name: str, form: str) -> str:
    numbers = torch.tensor([v[name] for v in values], dtype=torch.float64)
    text = form.format(float(numbers.mean()))
    return text if len(numbers) == 1 else f"{text} +- {metrics.standard_error(numbers):.3f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", metavar="KEY=VALUE", help="dataset=cifar10 data_root=... device=cpu ...")
    parser.add_argument("--output", type=Path, default=Path("outputs/released_deviations"))
    parser.add_argument("--only", nargs="+", metavar="PAIR", help=f"of {', '.join(PAIRS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--attack-steps", type=int, default=7)
    parser.add_argument("--evaluation-steps", type=int, default=20)
    parser.add_argument("--test", type=int, default=1000, help="held-out images")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    return parser


if __name__ == "__main__":
    sys.exit(main())
