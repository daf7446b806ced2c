"""A data set under attack: logits of every run, what was verified of the images, and AutoAttack's single verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustflat.attacks.autoattack import AutoAttackSearch
from robustflat.attacks.ensemble_progress import Piece, Progress
from robustflat.attacks.ensemble_result import AttackRecord, AutoAttackResult
from robustflat.attacks.examples import require_answers
from robustflat.attacks.judging import succeeded
from robustflat.attacks.pgd import copies
from robustflat.attacks.rehearsal import rehearse
from robustflat.attacks.sanity import Finding, check_verified, verify
from robustflat.attacks.strongest import Strongest, judged_logits, runs_by_pass, strongest
from robustflat.evaluation.turns import in_turn
from robustflat.geometry.input_ball import InputBall
from robustflat.memory import MemoryBudget
from robustflat.models.precision import device_of
from robustflat.ranks import workers
from robustflat.types import Attack, Batch

COLUMNS = ("tried", "broken", "loss", "margin", "size", "queries")
"""What AutoAttack records of every example in each of its attacks; see `AttackRecord`."""


class Attacked(NamedTuple):
    """What an attack has done to a data set of N examples.

    Attributes:
        logits: float32 (R, N, K) of R runs, judged by the network itself, on the CPU.
        findings: checks of the adversarial images, and for AutoAttack those of network and gradients.
        verdicts: for AutoAttack each of `COLUMNS` as (A, N) for its A attacks; else empty.
        costs: for AutoAttack name -> seconds, images forward and backward, in order of the attacks; else empty.
    """

    logits: Tensor
    findings: tuple[Finding, ...]
    verdicts: Mapping[str, Tensor]
    costs: Mapping[str, tuple[float, int, int]]


def attack_batches(
    model: nn.Module,
    batches: Sequence[Batch],
    attack: Attack,
    *,
    ball: InputBall,
    runs: int,
    at_once: int,
    search: str,
    memory_budget: MemoryBudget = "auto",
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Attacked:
    """Independent runs of any attack on every batch.

    Args:
        model: images in [0, 1] -> logits; left as found.
        batches: un-augmented, with class labels.
        attack: run `runs` times on every image.
        ball: where its images must lie; images outside are counted and reported, in float64.
        runs: number of runs R, >= 1.
        at_once: images in one pass, runs counted.
        search: see `robustflat.attacks.strongest.SEARCHES`.
        memory_budget: of one pass and its gradient, see `robustflat.attacks.searching.Searching`.
        generator: source of all draws, on the model's device.
        progress: finished batches, with the generator's state after them; those are not attacked again.

    Raises:
        UserError: if labels are not classes of the model, or logits are not finite.
    """
    device = device_of(model)
    run = partial(strongest, model, attack=attack, generator=generator, search=search, memory_budget=memory_budget)

    def attacked(number: int) -> Piece:
        piece = None if progress is None else progress.load("batch", number)
        if piece is None:
            batch = Batch(batches[number].x.to(device), batches[number].y.to(device))
            logits, outside, wrong = _runs(run, batch, ball, runs, at_once)
            piece = {"logits": logits.cpu(), "outside": outside, "wrong": wrong, "state": generator.get_state()}
            if progress is not None:
                progress.save("batch", number, piece)
        else:
            generator.set_state(piece["state"])
        return piece

    def rehearsal(number: int, stand_in: torch.Generator) -> bool:
        x = batches[number].x.to(device)
        return all(rehearse(attack, copies(x, now), stand_in) for now in runs_by_pass(len(x), runs, at_once))

    pieces = in_turn(attacked, len(batches), generator, rehearsal)
    logits = torch.cat([piece["logits"] for piece in pieces], dim=1)
    labels = torch.cat([batch.y.cpu() for batch in batches])
    for run in logits:
        require_answers(run, labels)
    refused, fooled = (sum(piece[part] for piece in pieces) for part in ("outside", "wrong"))
    return Attacked(logits, (check_verified(refused, fooled, counted=True),), {}, {})


def _runs(
    run: Callable[[Tensor, Tensor], Strongest], batch: Batch, ball: InputBall, runs: int, at_once: int
) -> tuple[Tensor, int, int]:
    """Logits (R, B, K), and how many misclassified images lie outside the ball, and are there in all."""
    x, y = batch
    parts = []
    outside = wrong = 0
    for now in runs_by_pass(len(y), runs, at_once):
        many_x, many_y = copies(x, now), copies(y, now)
        result = run(many_x, many_y)
        misled = succeeded(result.logits, many_y)
        wrong += int(misled.sum())
        outside += int((misled & ~verify(result.x_adv, many_x, ball).allowed).sum())
        parts.append(result.logits.float().view(now, len(y), -1))
    return torch.cat(parts), outside, wrong


def autoattack_batches(
    model: nn.Module,
    batches: Sequence[Batch],
    attack: AutoAttackSearch,
    *,
    at_once: int,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Attacked:
    """AutoAttack on all examples together: survivors packed into full batches, every verdict kept.

    Args:
        model, batches: see `attack_batches`.
        attack: which version, ball and search.
        at_once: images in one pass; with another number the draws are others.
        generator: gives the seed.
        progress: its folder keeps finished batches of each attack.

    Raises:
        UserError: see `attack_batches`.
    """
    device = device_of(model)
    seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    x, y = (torch.cat([part.to(device) for part in parts]) for parts in zip(*batches, strict=True))
    evaluation = attack.evaluation(seed=seed, batch_size=at_once)
    result = evaluation(model, x, y, progress=None if progress is None else progress.folder / "autoattack")
    parts = torch.split(result.adversarial.to(x), [len(batch.y) for batch in batches])
    logits = torch.cat(workers().map(lambda part: judged_logits(model, part).float(), parts)).cpu()
    require_answers(logits, y.cpu())
    return Attacked(logits[None], result.sanity.findings, _verdicts(result), _costs(result.attacks))


def _verdicts(result: AutoAttackResult) -> dict[str, Tensor]:
    return {name: torch.stack([getattr(record, name) for record in result.attacks]) for name in COLUMNS}


def _costs(records: Sequence[AttackRecord]) -> dict[str, tuple[float, int, int]]:
    return {record.name: (record.seconds, record.forwards, record.backwards) for record in records}
