"""A study file: which experiments, seeds and evaluations a study consists of, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from robustflat.errors import UserError, require_one_of

SPECIAL = ("seed=", "outputs=", "hydra", "--")
"""Beginnings of overrides that an experiment may not have: the study itself sets them."""

SPECIAL_IN_EVALUATIONS = ("run=", "checkpoint=", "part=", "device=", "threads=", "data_root=", *SPECIAL[1:])
"""The same for evaluations, which are about the run and on its device."""


@dataclass(frozen=True)
class Experiment:
    """One configuration to train, apart from its seed.

    Attributes:
        name: key in the study file.
        label: what people call it, such as "TRADES 6".
        family: the method it belongs to, such as "TRADES".
        overrides: arguments of `train.py`.
        part: which network of the run counts: "model", or "average" for the averaged weights.
    """

    name: str
    label: str
    family: str
    overrides: tuple[str, ...]
    part: str


@dataclass(frozen=True)
class StudyFile:
    """What a file in conf/study says.

    Attributes:
        title: of the report.
        question: what the study is to answer, in one sentence.
        experiments: in the order in which they are started.
        seeds: every experiment is trained once with each.
        common: arguments of `train.py` for all experiments, before their own.
        evaluations: arguments of one call of `evaluate.py` each, by a name that only messages use.
        attacks, measures: files of conf/attack and conf/flatness, added to every evaluation that attacks or measures.
        report: fields of `reporting.records.Study` for the page, such as which attack gives the robust error.
    """

    title: str
    question: str
    experiments: tuple[Experiment, ...]
    seeds: tuple[int, ...]
    common: tuple[str, ...]
    evaluations: Mapping[str, tuple[str, ...]]
    attacks: tuple[str, ...]
    measures: tuple[str, ...]
    report: Mapping[str, Any]

    def commands(self) -> dict[str, list[str]]:
        """Arguments of `evaluate.py` by evaluation, added attacks and measures included."""
        added = [f"+attack@evaluation.attacks.{name}={name}" for name in self.attacks]
        added += [f"+flatness@evaluation.measures.{name}={name}" for name in self.measures]
        return {name: [*added, *given] for name, given in self.evaluations.items()}


def read_study(node: Mapping[str, Any], name: str) -> StudyFile:
    """The study that plain values of a file describe.

    Args:
        node: content of the file.
        name: of the study, for messages.

    Raises:
        UserError: for a field that is missing, unknown or of another form, with its place in the file.
    """
    known = [field.name for field in fields(StudyFile)]
    for key in node:
        require_one_of(f"study {name}: a field", key, known)
    experiments = _mapping(node.get("experiments"), f"study {name}: experiments")
    evaluations = _mapping(node.get("evaluations"), f"study {name}: evaluations")
    for key, empty in (("experiments", not experiments), ("evaluations", not evaluations)):
        if empty:
            raise UserError(f"study {name}: {key} is empty; it needs at least one entry.")
    given = {key: _texts(value, f"study {name}: evaluations.{key}") for key, value in evaluations.items() if value}
    for key, texts in given.items():
        refuse_special(texts, f"study {name}: evaluations.{key}", evaluation=True)
    common = _texts(node.get("common"), f"study {name}: common")
    refuse_special(common, f"study {name}: common")
    return StudyFile(
        title=str(node.get("title") or name),
        question=str(node.get("question") or ""),
        experiments=tuple(_experiment(name, key, value) for key, value in experiments.items() if value is not None),
        seeds=_seeds(node.get("seeds"), f"study {name}: seeds"),
        common=common,
        evaluations=given,
        attacks=_texts(node.get("attacks"), f"study {name}: attacks"),
        measures=_texts(node.get("measures"), f"study {name}: measures"),
        report=_mapping(node.get("report"), f"study {name}: report"),
    )


def _experiment(study: str, key: str, value: object) -> Experiment:
    where = f"study {study}: experiments.{key}"
    given = _mapping(value, where)
    for field in given:
        require_one_of(f"{where}: a field", field, ("label", "family", "overrides", "part"))
    overrides = _texts(given.get("overrides"), f"{where}.overrides")
    refuse_special(overrides, f"{where}.overrides")
    label = str(given.get("label") or key)
    part = str(given.get("part") or "model")
    require_one_of(f"{where}.part", part, ("model", "average"))
    return Experiment(key, label, str(given.get("family") or label), overrides, part)


def refuse_special(overrides: Sequence[str], where: str, *, evaluation: bool = False) -> None:
    """Refuse what would be ignored, or send a run elsewhere than the study looks for it.

    Args:
        overrides: arguments of `train.py`, or of `evaluate.py`.
        where: place in the study, for the message.
        evaluation: whether they are those of `evaluate.py`.

    Raises:
        UserError: naming the first.
    """
    for text in overrides:
        if text.lstrip("+~").startswith(SPECIAL_IN_EVALUATIONS if evaluation else SPECIAL):
            kind, sets = (
                ("evaluations", "run, part, device, outputs") if evaluation else ("experiments", "seed, outputs")
            )
            raise UserError(f"{where}: '{text}' is not for {kind}: the study sets {sets} and launcher.")


def _mapping(value: object, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be a mapping (name: ...), got {value!r}.")
    return {str(key): entry for key, entry in value.items()}


def _texts(value: object, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise UserError(f"{where} must be a list such as [trainer=trades, trainer.loss.beta=6], got {value!r}.")
    return tuple(value)


def _seeds(value: object, where: str) -> tuple[int, ...]:
    listed = [value] if isinstance(value, int) else value
    seeds = [s for s in listed if isinstance(s, int) and s >= 0] if isinstance(listed, Sequence) else []
    if not seeds or len(set(seeds)) < len(seeds) or seeds != list(listed):  # type: ignore[call-overload]
        raise UserError(f"{where} must be a list of different whole numbers >= 0 such as [0, 1, 2], got {value!r}.")
    return tuple(seeds)
