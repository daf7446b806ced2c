"""Which command trains what a name of the paper's released registry promises, and where that name did not keep it.

    python scripts/find_experiment.py at_linf_gd_normalized_lr0007_mom0_i7_e00314_f100_ls01

prints `python train.py +experiment=iccv21/label_smoothing_01` and what the released code did otherwise. Names of
attacks and of lists lead to commands of evaluate.py, with RUN for the id of a run. `--config` is the old configuration
module, which decided on data and augmentation; `--epochs` and `--epoch` are the old options for snapshots.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from robustflat.apps.old_attack_names import EPSILONS, LISTS, find_evaluation, number

EXPERIMENTS = Path(__file__).resolve().parents[1] / "conf" / "experiment" / "iccv21"
RELEASED = EXPERIMENTS.with_name("iccv21_released")
DATASETS = {"cifar10_noaa": "cifar10", "cifar10": "cifar10_autoaugment", "cifar10_500k": "cifar10_500k"}
ATTACK = r"linf_gd_normalized_lr0007_mom0_i(?P<steps>1|3|5|7|14)_e(?P<epsilon>00235|00275|00314|00352)"
NO_MOVE = "The released code forgets its last step on the weights: {steps} acted as {fewer}."
CLIPPED = "It also clips each entry of the gradient at 0.05; that is not done here."


PARTS = """
normal training at linf gd normalized lr{0007,02,01,001,00001,0001,1,10} mom{0,09} i{1,3,5,7,10,14,20} f100
e{00235,00275,00314,00352,1,075,05,04,03,025,02,01,005,001,00075,0005,0004,0003,00025,0002,0001,000075,000025,00001,10}
s{05,2} slog{05,2} b{4,8,16,32,64,256,512} wa{,098,0985,099} extr uncal adam esgd{1,2,3,5} late lrf0316
const{01,001,0005} cyc{,2,3,4} nowd wd{005,001,0005,0001,00001} ls{001,005,01,02,03,04,05} ln{005,01,02,03,04,05}
pll ii mart{1,3,6,9} trades{1,3,6,9} ssl{05,1,2,4,8} tau{0,1,2,3,4} 0005p 001p 0015p 002p aa 500k
threshold simple awit nonb nonb2 l2 lwrl2normalized rl2normalized l2normalized fgsm random pop{1,3}
input weight sequential2 joint standard at{1,3,5,10,25,50} es train test set batch nonorm2 filter relative
absolute backtrack cifar10 benchmark epochs early stopping models
"""
"""The parts of old names between underscores: stem{endings}."""


class UnknownNameError(ValueError):
    """Not a name of the registry; the message says what looks most like it."""


@dataclass(frozen=True)
class Found:
    """What a name means here: an experiment file or `None`, overrides on top, and differences to know of."""

    experiment: str | None
    overrides: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def released(self) -> str | None:
        """The command that trains what the released code trained under this name, if that has a file of its own."""
        name = self.experiment or ""
        known = [n for n in (name, name.rpartition("_")[0]) if n and (RELEASED / f"{n}.yaml").is_file()]
        return f"python train.py +experiment=iccv21_released/{known[0]}" if known and not self.overrides else None

    def command(self) -> str:
        """The command line that trains it."""
        head = f"+experiment=iccv21/{self.experiment}" if self.experiment else "+setting=iccv21"
        return " ".join(["python train.py", head, *map(_quoted, self.overrides)])


def _quoted(override: str) -> str:
    return f"'{override}'" if "$" in override else override


def find(name: str, config: str = "cifar10_noaa") -> Found:
    """What a training name of the old registry means.

    Args:
        name: such as "trades6_linf_gd_normalized_lr0007_mom0_i7_e00314_f100", maybe with "_es" at the end.
        config: the old configuration module: cifar10_noaa, cifar10 (AutoAugment) or cifar10_500k.

    Raises:
        UnknownNameError: for another name or module.
    """
    if config not in DATASETS:
        raise UnknownNameError(f"no configuration module {config!r}; there were {', '.join(DATASETS)}.")
    stopped = name.endswith("_es")
    plain = name.removesuffix("_es")
    for pattern, meaning in GRAMMAR:
        match = re.fullmatch(pattern.replace("ATTACK", ATTACK), plain)
        if match:
            return _with_common(meaning(match), match, stopped=stopped, config=config)
    raise UnknownNameError(f"{name!r} is not a name of the registry.{_nearest(name)}")


def _nearest(name: str) -> str:
    """Parts of a name that no old name has, with valid ones that look like them; else how names begin."""
    words = _words()
    wrong = [part for part in name.removesuffix("_es").split("_") if part and part not in words]
    hints = []
    for part in wrong:
        close = get_close_matches(part, sorted(words), n=3, cutoff=0.4)
        hints.append(f" {part!r} is in no name; nearest: {', '.join(close)}." if close else f" {part!r} is in no name.")
    whole = get_close_matches(name, LISTS, n=1)
    if whole:
        return f" Did you mean {whole[0]!r}?"
    return "".join(hints) or (
        " All of its parts exist, but not in this order. Training names start with at_, at_pll_, at_ii_, "
        "at_ssl<weight>_, at_tau<number>_, trades<beta>_, mart<beta>_, <maximum>p_at_, simple_awit_ or "
        "threshold_awit_, or are normal_training; attacks with input_, weight_, sequential2_ or joint_; lists with "
        "cifar10_."
    )


def _words() -> set[str]:
    """The parts between underscores of all old names."""
    words: set[str] = set()
    for part in PARTS.split():
        stem, _, values = part.partition("{")
        words |= {f"{stem}{value}" for value in values.rstrip("}").split(",")}
    return words


def _with_common(found: Found, match: re.Match[str], *, stopped: bool, config: str) -> Found:
    overrides, notes = list(found.overrides), list(found.notes)
    groups = match.groupdict()
    if groups.get("steps") not in (None, "7"):
        overrides.append(f"attack.steps={groups['steps']}")
    if groups.get("epsilon") not in (None, "00314"):
        overrides.append(f"attack.ball.epsilon=${{px:{EPSILONS[groups['epsilon']]}}}")
    if config != "cifar10_noaa":
        overrides.append(f"dataset={DATASETS[config]}")
    if config == "cifar10_500k":
        notes.append("The released code takes 70 % extra images and AutoAugment: dataset.extra_fraction=0.7.")
    if stopped:
        overrides.append("evaluation=early_stopping")
        notes.append("Early stopping chooses among the snapshots; the paper chose on the last 500 test examples.")
    return Found(found.experiment, tuple(overrides), tuple(notes))


def _file(experiment: str, *notes: str, overrides: Sequence[str] = ()) -> Callable[[re.Match[str]], Found]:
    return lambda match: Found(experiment, tuple(overrides), notes)


def _valued(
    prefix: str, trainer: str, key: str, note: str = "", *, right: str = ""
) -> Callable[[re.Match[str]], Found]:
    """A value in the name: the experiment file called prefix + value if there is one, else an override of `key`.

    `note` does not apply to the value `right`, the one that the released code used throughout.
    """

    def meaning(match: re.Match[str]) -> Found:
        value = match["value"]
        notes = (note,) if note and value != right else ()
        experiment = f"{prefix}_{value}"
        if (EXPERIMENTS / f"{experiment}.yaml").is_file():
            return Found(experiment, (), notes)
        method = [f"trainer={trainer}"] if trainer else []
        return Found(None, (*method, f"{key}={number(value)}"), notes)

    return meaning


def _averaged(match: re.Match[str]) -> Found:
    tau = match["value"] or "09975"
    note = "The released code averages with tau = 0.9975 whatever the name says."
    return Found(f"weight_averaging_{tau}", (), () if tau == "09975" else (note,))


def _clipped(match: re.Match[str]) -> Found:
    value = match["value"]
    maximum = "trainer.callbacks.clip.maximum"
    if (EXPERIMENTS / f"weight_clipping_{value}.yaml").is_file():
        return Found(f"weight_clipping_{value}")
    return Found("weight_clipping_001", (f"{maximum}={number(value)}",))


def _cyclic(match: re.Match[str]) -> Found:
    cycles = match["value"] or "1"
    note = "The released code runs one cycle of 30 epochs whatever the name says."
    return Found(f"cyclic_{cycles}", (), () if cycles == "1" else (note,))


def _constant(match: re.Match[str]) -> Found:
    value = match["value"]
    if (EXPERIMENTS / f"constant_rate_{value}.yaml").is_file():
        return Found(f"constant_rate_{value}")
    return Found(None, ("schedule=constant", f"optimizer.lr={number(value)}"))


def _early(match: re.Match[str]) -> Found:
    value = match["value"]
    if (EXPERIMENTS / f"pgd_tau_{value}.yaml").is_file():
        return Found(f"pgd_tau_{value}")
    return Found(None, ("attack=pgd_tau", f"attack.tau={value}"))


def _perturbed(match: re.Match[str]) -> Found:
    steps, population = int(match["count"] or 1), match["population"]
    overrides = [f"trainer.gradient.ball.radius={number(match['radius'])}"]
    notes = [NO_MOVE.format(steps=steps, fewer=steps - 1), CLIPPED]
    if match["rate"]:
        overrides += [f"trainer.gradient.steps={steps}", f"trainer.gradient.step_size={number(match['rate'])}"]
    if match["scaling"] not in ("_lwrl2normalized", "_fgsm_lwrl2normalized"):
        notes.append("It scales the weight gradient over all layers or not at all; here it is scaled in each layer.")
    if population != "1":
        notes.append(f"A population of {population} is not there: every step uses one perturbation.")
    notes += _curriculum(match["curriculum"])
    experiment = f"awp_{match['radius']}"
    if not match["rate"] and (EXPERIMENTS / f"{experiment}.yaml").is_file():
        return Found(experiment, (), tuple(notes))
    return Found(None, ("trainer=awp", *overrides), tuple(notes))


def _random(match: re.Match[str]) -> Found:
    overrides = ["trainer=random_weights", f"trainer.gradient.ball.radius={number(match['radius'])}"]
    notes = [CLIPPED, *_curriculum(match["curriculum"])]
    if match["curriculum"] == "threshold":
        overrides.append(f"trainer.gradient.population={match['population']}")
    elif match["population"] != "1":
        notes.append("The released code ignores the population under the curriculum `simple`.")
    return Found(None, tuple(overrides), tuple(notes))


def _curriculum(name: str) -> list[str]:
    if name == "simple":
        return []
    return ["It perturbs only while the loss is below 2.1; here it begins after trainer.gradient.warmup_epochs."]


SWITCHES = (
    "It trains at a constant rate and without momentum (schedule=constant optimizer.momentum=0 "
    "optimizer.nesterov=false); here schedule and momentum take effect."
)
DECAYS = "The released code trains with weight decay 0.001 whatever the name says."
UNIFORM = "The released code spreads tau over all classes: trainer.loss.label_smoothing_target=uniform."
HALF_CLEAN = "The released code leaves half of the batch clean; here all of it is attacked."
SCALED = "The name is a folder for the trained network times that factor, no training: robustflat.models.rescale, {}."
EXTERNAL = "Only the old notebook could read this name; the old tools for attacks refuse it."
NOWHERE = "No old configuration writes to the folder that this name reads."
AWIT = r"(?P<curriculum>simple|threshold)_awit_nonb2?_l2_"

GRAMMAR: tuple[tuple[str, Callable[[re.Match[str]], Found]], ...] = (
    (r"normal_training", lambda match: Found(None, ("trainer=standard",))),
    (r"at_ATTACK", lambda match: Found(None, ("trainer=at_half",))),
    (r"at_ATTACK_f100", _file("at")),
    (r"at_ATTACK_f100_s(?P<value>05|2)", _file("at", SCALED.format("rescaled(model, 0.5 or 2, images)"))),
    (
        r"at_ATTACK_f100_slog(?P<value>05|2)",
        _file("at", SCALED.format("and the logits times it")),
    ),
    (r"aa_at_linf_gd_normalized_lr0007_mom0_i7_e00314_f100", _file("autoaugment", EXTERNAL)),
    (r"500k_at_linf_gd_normalized_lr0007_mom0_i7_e00314_f100", _file("unlabeled", EXTERNAL, NOWHERE)),
    (r"at_ATTACK_f100_b(?P<value>4|8|16|32|64|256|512)", _valued("batch_size", "", "dataset.batch_size")),
    (r"at_ATTACK_f100_wa(?P<value>098|0985|099|)(_extr|_extr_uncal)?", _averaged),
    (r"at_ATTACK_f100_adam", _file("adam")),
    (r"at_ATTACK_f100_esgd(?P<value>[1235])", lambda match: Found(f"entropy_sgd_l{match['value']}", (), (SWITCHES,))),
    (r"at_ATTACK_f100_late", _file("late")),
    (r"at_ATTACK_f100_lrf0316", _file("at", overrides=["schedule.factor=0.316"])),
    (r"at_ATTACK_f100_lr(?P<value>02|01|001)", _valued("learning_rate", "", "optimizer.lr")),
    (r"at_ATTACK_f100_const(?P<value>01|001|0005)", _constant),
    (r"at_ATTACK_f100_cyc(?P<value>[234]|)", _cyclic),
    (r"at_ATTACK_f100_nowd", _file("weight_decay_0")),
    (
        r"at_ATTACK_f100_wd(?P<value>005|001|0005|0001|00001)",
        _valued("weight_decay", "", "optimizer.weight_decay", DECAYS, right="0001"),
    ),
    (
        r"at_ATTACK_f100_ls(?P<value>001|005|01|02|03|04|05)",
        _valued("label_smoothing", "label_smoothing", "trainer.loss.label_smoothing", UNIFORM),
    ),
    (
        r"at_ATTACK_f100_ln(?P<value>005|01|02|03|04|05)",
        _valued("label_noise", "label_noise", "trainer.loss.label_noise"),
    ),
    (r"at_pll_ATTACK_f100", _file("predicted_labels")),
    (r"at_ii_ATTACK_f100", _file("only_correct")),
    (r"mart(?P<value>[1369])_ATTACK_f100", _valued("mart", "mart", "trainer.loss.beta")),
    (r"trades(?P<value>[1369])_ATTACK_f100", _valued("trades", "trades", "trainer.loss.beta")),
    (
        r"at_ssl(?P<value>05|1|2|4|8)_ATTACK_f100",
        _valued("self_supervision", "self_supervised", "trainer.loss.weight", HALF_CLEAN),
    ),
    (r"at_tau(?P<value>[0-4])_ATTACK_f100", _early),
    (r"(?P<value>0005|001|0015|002)p_at_ATTACK_f100", _clipped),
    (
        AWIT + r"gd(_normalized)?(?P<scaling>_lwrl2normalized|_rl2normalized|_l2normalized|)_lr(?P<rate>001|1)_mom0_"
        r"i(?P<count>[135])_e(?P<radius>\d+)_ATTACK_pop(?P<population>[13])",
        _perturbed,
    ),
    (
        AWIT
        + r"gd(?P<scaling>_fgsm_lwrl2normalized)(?P<rate>)(?P<count>)_e(?P<radius>\d+)_ATTACK_pop(?P<population>[13])",
        _perturbed,
    ),
    (AWIT + r"random_e(?P<radius>\d+)_ATTACK_pop(?P<population>[13])", _random),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print command and notes for each name; 1 if a name is unknown."""
    parser = argparse.ArgumentParser(description="Find the experiment that a name of the old registry means.")
    parser.add_argument("names", nargs="+", help="names of experiments, attacks, or lists of attacks")
    parser.add_argument("--epochs", action="store_true", help="of attacks: on all snapshots, as with the old tools")
    parser.add_argument("--epoch", type=int, help="of attacks: on the snapshot of this epoch")
    parser.add_argument("--config", default="cifar10_noaa", help=f"old module: {', '.join(DATASETS)}")
    options = parser.parse_args(arguments)
    checkpoints = "all" if options.epochs else None if options.epoch is None else str(options.epoch)
    status = 0
    for name in options.names:
        try:
            print("\n".join(_answer(name, options.config, checkpoints)))
        except UnknownNameError as error:
            print(error, file=sys.stderr)
            status = 1
    return status


def _answer(name: str, config: str, checkpoints: str | None) -> list[str]:
    evaluations = find_evaluation(name, checkpoints)
    if evaluations is not None:
        return [*evaluations.commands, *(f"  # {note}" for note in evaluations.notes)]
    found = find(name, config)
    released = found.released()
    lines = [found.command(), *(f"  # {note}" for note in found.notes)]
    return [*lines, f"  # As the released code trains it: {released}"] if released else lines


if __name__ == "__main__":
    sys.exit(main())
