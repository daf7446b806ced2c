"""The measurements of one run, piece by piece: what is stored already is not measured again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

import robustflat
from robustflat.apps.build import build
from robustflat.apps.profiling import Parts, profile_settings
from robustflat.apps.surrogates import give_surrogates
from robustflat.evaluation.plan import EvaluationPlan
from robustflat.models.modes import evaluating
from robustflat.ranks import workers

if TYPE_CHECKING:
    from robustflat.apps.train import Session

RESULTS = "results.json"


def measure(session: Session, key: str) -> dict[str, Any]:
    """Measure every network of a trained run by its evaluation plan, and store each piece as it is found.

    Within `sharing_work` every rank makes this call and they share the work; the first one writes and logs. The
    session's folder, console and logger are used on the first rank only.

    Args:
        session: the trained run.
        key: name of the evaluation in results.json (see `apps.train.evaluation_key`).

    Returns:
        description (one line on how the figures were made), facts (one line on the run), and weights: name ->
        split -> values, with flatness beside the splits.
    """
    config, folder, ranks = session.config, session.folder, workers()
    plan, measure_flatness = instruments(config)
    stored = ranks.on_first(lambda: folder.read_json(RESULTS))
    results = stored.get(key) if isinstance(stored.get(key), dict) and not config.force else None
    results = results or {"facts": facts(session), "description": describe(session, plan), "weights": {}}
    parts = Parts(profile_settings(config.profile), folder.path, session.console)
    for name, model in session.trainer.networks().items():
        measured = results["weights"].setdefault(name, {})
        for piece in _pieces(plan, measure_flatness):
            if piece in measured:
                continue
            label = f"{piece} ({name} weights)"
            status = session.console.status(f"measuring {label}") if ranks.first else nullcontext()
            with status, parts.part(label):
                if piece == "flatness":
                    with evaluating(model):
                        values = plan.measure_flatness(model, session.dataset, measure_flatness, seed=config.seed)
                else:
                    values = plan.measure_split(model, session.dataset, piece, seed=config.seed)
            measured[piece] = ranks.agreed(values)  # times differ
            ranks.on_first(lambda: folder.write_json(RESULTS, {**stored, key: {**results, "complete": False}}))
    results["complete"] = True
    ranks.on_first(lambda: folder.write_json(RESULTS, {**stored, key: results}))
    parts.write()
    if ranks.first:
        session.logger.summary(dict(_flat(results["weights"], "final")))
    return results


def instruments(config: DictConfig) -> tuple[EvaluationPlan, Any]:
    """Evaluation plan and flatness measure (`None`: there is none) of a run, with the networks that their attacks need.

    Raises:
        UserError: if a constructor refuses its values, or a surrogate is not there or does not fit.
    """
    plan: EvaluationPlan = build(config.evaluation)
    flatness = None if config.flatness is None else build(config.flatness)
    give_surrogates([*plan.attacks.values(), *plan.measures.values(), flatness], config)
    return plan, flatness


def _pieces(plan: EvaluationPlan, measure_flatness: object | None) -> list[str]:
    pieces = [split for split in ("test", "train") if plan.splits[split] is not None]
    return [*pieces, "flatness"] if measure_flatness is not None and plan.flatness_split is not None else pieces


def facts(session: Session) -> str:
    """One line on what was trained."""
    seed, trainer = session.config.seed, session.trainer
    return f"{session.name}: {trainer.epoch} epochs, seed {seed}, weights in {trainer.precision}"


def describe(session: Session, plan: EvaluationPlan) -> str:
    """One line on how the figures were made: threat model, intervals, precision, machine, code."""
    return (
        f"Threat model {plan.norm}, epsilon {plan.epsilon:.5g}; measured in fp32 on {session.dataset.device} with "
        f"seed {session.config.seed}; [..] 95 % Wilson interval, +- one standard error; robustflat "
        f"{robustflat.__version__}, torch {torch.__version__}."
    )


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    """Leaves of a nested mapping that are numbers, named by their path."""
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found.extend(_flat(value, f"{prefix}/{key}"))
        elif isinstance(value, int | float) and key != "seconds":
            found.append((f"{prefix}/{key}", float(value)))
    return found
