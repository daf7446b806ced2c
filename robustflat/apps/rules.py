"""Values of different groups that must fit together, each as one small named rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from omegaconf import DictConfig, OmegaConf

from robustflat.apps.profiling import profile_settings
from robustflat.errors import UserError

Rule = Callable[[DictConfig], Iterator[str]]

MOST_THREADS = 1024
"""Far more than any machine has cores; what torch refuses or crashes at lies above."""


def check_together(config: DictConfig) -> None:
    """Apply every rule to a configuration whose single values are already valid.

    Raises:
        UserError: lists all violated rules, each with both keys and both values.
    """
    problems = [problem for rule in RULES for problem in rule(config)]
    if problems:
        lines = "\n".join(f"  - {p}" for p in problems)
        raise UserError(f"Some values of the configuration do not fit together:\n{lines}")


def _get(config: DictConfig, key: str) -> object:
    return OmegaConf.select(config, key, default=None)


def _same_classes(config: DictConfig) -> Iterator[str]:
    for model_key, data_key in (
        ("model.classes", "dataset.classes"),
        ("model.in_channels", "dataset.channels"),
    ):
        model, data = _get(config, model_key), _get(config, data_key)
        if model is not None and data is not None and model != data:
            yield f"{model_key}={model}, but {data_key}={data}: a network must fit its data."


def _mean_per_channel(config: DictConfig) -> Iterator[str]:
    channels = _get(config, "dataset.channels")
    for key in ("dataset.mean", "dataset.std"):
        values = _get(config, key)
        if OmegaConf.is_list(values) and len(values) != channels:  # type: ignore[arg-type]
            yield f"{key} has {len(values)} values, but dataset.channels={channels}."  # type: ignore[arg-type]


def _attack_needs_a_ball_of_known_norm(config: DictConfig) -> Iterator[str]:
    norm = _get(config, "evaluation.norm")
    threat = _get(config, "dataset.threat")
    if norm is not None and isinstance(threat, DictConfig) and norm not in threat:
        yield (
            f"evaluation.norm={norm}, but dataset.threat knows {', '.join(map(str, threat))}: "
            f"give dataset.threat.{norm}.epsilon and dataset.threat.{norm}.step_size."
        )


def _trades_needs_an_attack(config: DictConfig) -> Iterator[str]:
    loss, attack = str(_get(config, "trainer.loss._target_")), str(_get(config, "attack._target_"))
    if loss.endswith((".Trades", ".Mart")) and attack.endswith(".NoAttack"):
        yield f"trainer.loss is {loss.rsplit('.', 1)[-1]}, which needs adversarial examples, but attack=none."


def _wrappers_need_class_labels(config: DictConfig) -> Iterator[str]:
    loss = str(_get(config, "trainer.loss._target_"))
    wrappers = _get(config, "trainer.wrappers")
    if loss.endswith(".Trades") and isinstance(wrappers, DictConfig) and any(v is not None for v in wrappers.values()):
        yield "trainer.wrappers change which labels the attack sees, but TRADES attacks its own predictions."


def _snapshots_within_training(config: DictConfig) -> Iterator[str]:
    every, epochs = _get(config, "trainer.callbacks.snapshots.every"), _get(config, "trainer.epochs")
    if isinstance(epochs, int) and epochs < 1:
        yield f"trainer.epochs={epochs}: at least one epoch is needed."
    if isinstance(every, int) and every < 1:
        yield f"trainer.callbacks.snapshots.every={every}: must be at least 1 (~trainer.callbacks.snapshots: none)."


def _flatness_is_meaningful(config: DictConfig) -> Iterator[str]:
    if _get(config, "evaluation.flatness") is not None and _get(config, "flatness") is None:
        yield "evaluation.flatness names examples, but there is no flatness measure: evaluation.flatness=null."


def _threads_can_be_started(config: DictConfig) -> Iterator[str]:
    threads = _get(config, "threads")
    if isinstance(threads, int) and threads < 0:
        yield f"threads={threads}: must be at least 1, or 0 for the customary number."
    if isinstance(threads, int) and threads > MOST_THREADS:
        yield f"threads={threads}: at most {MOST_THREADS}; more than the machine has cores are of no use."


def _profile_is_readable(config: DictConfig) -> Iterator[str]:
    try:
        profile_settings(_get(config, "profile"))
    except UserError as error:
        yield str(error)


RULES: tuple[Rule, ...] = (
    _same_classes,
    _mean_per_channel,
    _attack_needs_a_ball_of_known_norm,
    _trades_needs_an_attack,
    _wrappers_need_class_labels,
    _snapshots_within_training,
    _flatness_is_meaningful,
    _threads_can_be_started,
    _profile_is_readable,
)
