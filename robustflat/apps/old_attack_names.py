"""What a name of an attack or a list in the paper's released registry means here: commands of `evaluate.py`.

Names of training experiments are read by `scripts/find_experiment.py`, which asks here for all others.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

EPSILONS = {"00235": 6, "00275": 7, "00314": 8, "00352": 9}
"""Radius in a name, the digits of x/255 without point, cut off -> x."""


@dataclass(frozen=True)
class Evaluations:
    """Commands that measure what a name promises, and sentences about where the name did not keep it."""

    commands: tuple[str, ...]
    notes: tuple[str, ...] = ()


def number(text: str) -> str:
    """Number of the registry's format, in which the point was left out: "00314" -> "0.0314", "10" -> "10"."""
    return f"0.{text[1:]}" if text.startswith("0") and len(text) > 1 else text


def find_evaluation(name: str, checkpoints: str | None = None) -> Evaluations | None:
    """What the name of an attack or of a list of attacks means; `None` if it is none.

    Args:
        name: such as "input_linf_gd_normalized_lr0007_mom0_i20_e00314_at10" or "cifar10_benchmark".
        checkpoints: the old tools' options --epochs ("all") and --epoch N ("N"): which snapshots.
    """
    found = LISTS.get(name)
    for pattern, meaning in GRAMMAR:
        match = re.fullmatch(pattern, name)
        if match:
            found = meaning(match)
    if found is None:
        return None
    if checkpoints is None:
        return found
    commands = tuple(c if "checkpoints=" in c else f"{c} checkpoints={checkpoints}" for c in found.commands)
    return Evaluations(commands, found.notes)


def _evaluate(*overrides: str) -> str:
    return " ".join(["python evaluate.py run=RUN", *(_quoted(word) for word in overrides if word)])


def _quoted(override: str) -> str:
    """An override as a shell and Hydra take it: a value with brackets, such as a split, is a string."""
    key, _, value = override.partition("=")
    if "[" in value:
        return f"'{key}=\"{value}\"'"
    return f"'{override}'" if "$" in override else override


def _radius(epsilon: str) -> str:
    return "" if epsilon == "00314" else f"evaluation.epsilon=${{px:{EPSILONS[epsilon]}}}"


def _examples(role: str, split: str) -> list[str]:
    """Attacks on one set only."""
    return [f"evaluation.{role}={split}", f"evaluation.{'train' if role == 'test' else 'test'}=null"]


RELEASED_ATTACK = (
    "The released attack starts at uniform norm with epsilon cut off (0.0314 for 8/255): "
    "attack.random_start=uniform_norm evaluation.epsilon=0.0314."
)
NO_SQUARE = (
    "The released `standard` has no Square attack and begins with FAB: attack.version=custom "
    "'+attack.attacks=[fab-t,apgd-ce,apgd-t]'."
)
LAST_500 = "Early stopping looks at the last 500 test examples, so its errors are not those of unseen images."


def _input_pgd(match: re.Match[str]) -> Evaluations:
    where, notes = match["where"], [RELEASED_ATTACK]
    overrides = ["attack=pgd20", f"attack.steps={match['steps']}", f"attack.restarts={match['attempts']}"]
    overrides += ["+attack.momentum=0.9"] if match["momentum"] == "09" else []
    overrides.append(_radius(match["epsilon"]))
    if where == "_es":
        overrides += _examples("test", "test[-500:]")
        notes.append(LAST_500)
    else:
        overrides += _examples("train", "train[:1000]") if where else _examples("test", "test[:1000]")
    return Evaluations((_evaluate(*overrides),), tuple(notes))


def _input_autoattack(match: re.Match[str]) -> Evaluations:
    examples = _examples("train", "train[:1000]") if match["where"] else _examples("test", "test[:1000]")
    return Evaluations((_evaluate("attack=autoattack", _radius(match["epsilon"]), *examples),), (NO_SQUARE,))


WEIGHT_SPLITS = {
    "": "test[:1000]", "_test": "test[:1000]", "_test_test": "test[:1000]", "_es": "test[-500:]", "_set": "test[:1000]",
    "_test_set": "test[:1000]", "_train": "train[:1000]", "_train_test": "train[:1000]", "_train_set": "train[:1000]",
    "_train_test_set": "train[:1000]", "_test_batch": "test[-100:]",
}  # fmt: skip
"""Suffix -> the examples on which the name measures."""

ATTACKED = {
    "_test": "the last 100 test images",
    "_test_set": "the last 500 test images",
    "_train_test": "the last 100 training images",
    "_train_test_set": "the last 500 test images, in spite of its name",
}
"""Suffix of a gradient attack -> where the released code searches, if not where it measures."""


def _ball(match: re.Match[str]) -> list[str]:
    """Radius, groups and parameters of a ball in weight space."""
    shape = match["shape"]
    words = [f"flatness.ball.radius={number(match['radius'])}"]
    words += {"_filter": ["flatness.ball.grouping=filter"], "_relative": ["flatness.ball.grouping=global"]}.get(
        shape, []
    )
    if shape == "_absolute":
        words += ["flatness.ball.grouping=global", "flatness.ball.relative=false"]
    return words if match["norms"] else [*words, "+flatness.norm_layers=true"]


def _weight_random(match: re.Match[str]) -> Evaluations:
    relative, where = match["shape"] == "_relative", match["where"]
    sampling = "ball" if relative else "sphere"
    overrides = [
        "flatness=average_clean", *_ball(match), f"flatness.trials={match['attempts']}",
        f"+flatness.sampling={sampling}",
        "+flatness.draws=per_set", f"evaluation.flatness={WEIGHT_SPLITS[where]}",
    ]  # fmt: skip
    notes = []
    if relative:
        notes.append(
            "The released radius is a share of all parameters, though only some move, and draws have a uniform "
            "norm below it; here it is a share of the moved ones, and draws are uniform in the ball."
        )
    if where == "_es":
        notes.append(LAST_500)
    return Evaluations((_evaluate(*overrides),), tuple(notes))


def _weight_gradient(match: re.Match[str]) -> Evaluations:
    where, scaling = match["where"], match["scaling"]
    overrides = [
        "flatness=worst_clean", *_ball(match), f"flatness.restarts={match['attempts']}",
        f"flatness.steps={match['steps']}", f"+flatness.weight_step={number(match['rate'])}",
        f"evaluation.flatness={WEIGHT_SPLITS[where]}",
    ]  # fmt: skip
    notes = ["The released attack never evaluates its last step, and takes its first gradient at the unmoved weights."]
    if where in ATTACKED:
        searched = ATTACKED[where]
        notes.append(f"It is searched on {searched}; here it is searched on the examples on which it is measured.")
    wanted = {"": "_lwrl2normalized", "_relative": "_rl2normalized", "_absolute": "_l2normalized"}.get(match["shape"])
    if scaling != wanted:
        notes.append("Its step is not scaled like its ball; here a step is a length in units of the ball.")
    if match["momentum"] == "09" or match["backtrack"]:
        notes.append("It has momentum or backtracking on the weights; the ascent here has neither.")
    return Evaluations((_evaluate(*overrides),), tuple(notes))


ROBUST_RELEASED = "By the released code's protocol: flatness={} and evaluation.epsilon=0.0314."


def _sequential(match: re.Match[str]) -> Evaluations:
    overrides = [
        "flatness=average_robust", *_ball(match), f"flatness.attack.steps={match['steps']}", "flatness.trials=10",
        _radius(match["epsilon"]), f"evaluation.flatness={WEIGHT_SPLITS[match['where']]}",
    ]  # fmt: skip
    return Evaluations(
        (_evaluate(*overrides),),
        (
            "The released code draws one displacement for all examples, on the sphere; the paper, in the ball for "
            "each batch. " + ROBUST_RELEASED.format("average_robust_released"),
        ),
    )


def _joint(match: re.Match[str]) -> Evaluations:
    overrides = [
        "flatness=worst_robust", *_ball(match), f"flatness.steps={match['steps']}", "flatness.restarts=10",
        f"+flatness.weight_step={number(match['rate'])}", _radius(match["epsilon"]),
        f"evaluation.flatness={WEIGHT_SPLITS[match['where']]}",
    ]  # fmt: skip
    notes = [
        "The released code moves one displacement through all batches and keeps the last point; here each batch has "
        "its own and the best counts. " + ROBUST_RELEASED.format("worst_robust_released"),
    ]
    if match["shape"] == "_relative":
        notes.append("It scales the step in each layer though its ball is global; here by the ball.")
    return Evaluations((_evaluate(*overrides),), tuple(notes))


_STEPS, _EPSILON = r"(?P<steps>7|10|20)", r"(?P<epsilon>00235|00275|00314|00352)"
_SCALING = r"(?P<scaling>_lwrl2normalized|_rl2normalized|_l2normalized|)"
_INPUT = r"_linf_gd_normalized_lr0007_e" + _EPSILON + "_i" + _STEPS + "_at10"

GRAMMAR: tuple[tuple[str, Callable[[re.Match[str]], Evaluations]], ...] = (
    (
        r"input_linf_gd_normalized_lr0007_mom(?P<momentum>0|09)_i" + _STEPS + "_e" + _EPSILON
        + r"_at(?P<attempts>1|3|5|10|25)(?P<where>_es|_train|)",
        _input_pgd,
    ),
    (r"input_linf_aa_standard_e" + _EPSILON + r"(?P<where>_train|)", _input_autoattack),
    (
        r"weight_l2_random(?P<norms>_nonorm2|)(?P<shape>_filter|_relative|)_e(?P<radius>\d+)_at(?P<attempts>1|3|5|10|25|50)"
        r"(?P<where>_test|_es|_set|_train|_train_set|)",
        _weight_random,
    ),
    (
        r"weight_l2_gd(?P<norms>_nonorm2|)(?P<shape>_filter|_relative|_absolute|)" + _SCALING
        + r"(?P<backtrack>_backtrack|)_i" + _STEPS + r"_lr(?P<rate>00001|0001|001|01|1|10)_mom(?P<momentum>0|09)"
        r"_e(?P<radius>\d+)_at(?P<attempts>1|3|5|10|25)(?P<where>_test|_test_test|_es|_test_set|_train_test|_train_test_set)",
        _weight_gradient,
    ),
    (
        r"sequential2_weight_input_l2_random(?P<norms>_nonorm2)(?P<shape>_filter|)_e(?P<radius>\d+)" + _INPUT
        + r"(?P<where>_test|_train_test)",
        _sequential,
    ),
    (
        r"joint_weight_input_l2_gd(?P<norms>_nonorm2|)(?P<shape>_filter|_relative|)_lwrl2normalized_lr(?P<rate>0001|001)"
        r"_e(?P<radius>\d+)" + _INPUT + r"(?P<where>_test|_train_test|_test_batch)",
        _joint,
    ),
)  # fmt: skip

_NO_MEASURES = ("evaluation.flatness=null", "evaluation.flatness_train=null")
_INPUTS = (_evaluate("evaluation=paper", *_NO_MEASURES),)
_WORST = "0.00075,0.001,0.002,0.003,0.004,0.005"
_WEIGHTS = (
    "python evaluate.py -m run=RUN flatness=average_clean flatness.ball.radius=0.1,0.25,0.5,0.75,1",
    "python evaluate.py -m run=RUN flatness=worst_clean flatness.ball.radius=" + _WORST,
)
_JOINT = (_evaluate("evaluation=radii"),)
LISTS = {
    "cifar10_input_linf_benchmark": Evaluations(
        _INPUTS, (NO_SQUARE.replace("attack.", "evaluation.attacks.autoattack."),)
    ),
    "cifar10_weight_l2_benchmark": Evaluations(_WEIGHTS),
    "cifar10_weight_input_l2_linf_benchmark": Evaluations(_JOINT),
    "cifar10_benchmark": Evaluations((*_INPUTS, *_WEIGHTS, *_JOINT)),
    "cifar10_epochs_benchmark": Evaluations(
        (
            _evaluate(
                "evaluation=paper",
                "evaluation.attacks.autoattack=null",
                "evaluation.measures.average_small=null",
                "evaluation.measures.worst=null",
                "evaluation.flatness_train=null",
                "checkpoints=all",
            ),
        ),
        ("The released snapshots hold clean probabilities of 1,280 examples only; here all are evaluated.",),
    ),
    "cifar10_early_stopping_benchmark": Evaluations(
        (_evaluate("evaluation=early_stopping", "evaluation.selection.split=test[-500:]"),), (LAST_500,)
    ),
    "cifar10_models": Evaluations(
        ("python train.py -m '+experiment/iccv21=glob(*)'",),
        ("The list has 29 of the paper's models; this trains all 74 rows of its tables.",),
    ),
}
