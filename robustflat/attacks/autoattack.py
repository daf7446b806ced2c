"""AutoAttack: several attacks without knobs, one after another on the examples that are left.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", ICML 2020; L1 after "Mind the box", ICML 2021.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from robustflat.attacks.describe import describe
from robustflat.attacks.ensemble import EOT, SEARCHES, VERSIONS, MeanOf, attack_names, attack_piece, member
from robustflat.attacks.ensemble_progress import Piece, Progress, fingerprint
from robustflat.attacks.ensemble_result import AutoAttackResult, Tally
from robustflat.attacks.examples import Array, answer, batches_for, require_answers, searchable
from robustflat.attacks.hunt import PlainJudge
from robustflat.attacks.inputs import check_images, check_shapes
from robustflat.attacks.judging import held_still, judge, nothing_found, succeeded
from robustflat.attacks.objectives import cross_entropy, labels_of
from robustflat.attacks.sanity import (
    Finding,
    check_black_box,
    check_gradients,
    check_mode,
    check_model,
    check_range,
    check_verified,
    report,
)
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.explanation import Explanation, unknown_cost
from robustflat.geometry.input_ball import InputBall, L1Ball, L2Ball, LinfBall
from robustflat.models.fused import fast_copy
from robustflat.models.precision import exact_float32
from robustflat.ranks import workers
from robustflat.rng import generator_for
from robustflat.types import Forward, Found, Objective

_BALLS: Mapping[str, Callable[[float], InputBall]] = {"linf": LinfBall, "l2": L2Ball, "l1": L1Ball}


class AutoAttack:
    """Robust accuracy of a model by the attacks of Croce and Hein, with every verdict kept.

    >>> evaluate = AutoAttack(norm="linf", epsilon=8 / 255)
    >>> result = evaluate(model, images, labels)  # doctest: +SKIP
    >>> print(result)  # doctest: +SKIP

    Versions: "standard" is APGD-CE, targeted APGD-DLR, targeted FAB (one run for each of 9 targets, 100 steps each)
    and Square (5,000 queries); "plus" adds untargeted APGD-DLR and FAB, with 5 restarts, and 5 restarts of APGD-CE;
    "rand", for models that draw random numbers, is APGD-CE and APGD-DLR with every step and every judgement an
    average of 20 passes; "custom" runs the `attacks` named. In L1, APGD first searches larger balls, and "standard"
    runs APGD-CE 5 times and targeted APGD-DLR towards 5 classes, as published. With K < 10 classes there are at most
    K - 1 targets; the DLR loss with 3 classes leaves out the fourth logit, with 2 it is the margin, undivided (see
    `objectives`).

    Only examples that every attack so far has left are attacked, packed into full batches, and one leaves the
    search as soon as it is broken. Broken means: misclassified by the plain model in float32, inside ball and box
    in float64.

    Args:
        norm: "linf", "l2" or "l1".
        epsilon: radius in [0, 1] units, such as 8/255 (linf), 0.5 (l2), 12 (l1).
        version: "standard", "plus", "rand" or "custom".
        attacks: for "custom", names among `ATTACKS`, in the order they run.
        budget: "full", or "preview": APGD-CE and targeted APGD only, whose result is an upper bound.
        seed: >= 0; every attack and batch draws from a generator of its own.
        batch_size: examples attacked together, >= 1. Part of the random draws: another size gives other starts.
        search: what the attacks search on: "plain" (the model as it is), or a rewritten copy in "fp32" or "bf16"
            (see `models.inference`), which is faster. The plain model judges in every case.

    Raises:
        UserError: if a number is out of range, a name unknown, or two options contradict each other.
    """

    def __init__(
        self,
        *,
        norm: str = "linf",
        epsilon: float = 8 / 255,
        version: str = "standard",
        attacks: Sequence[str] | None = None,
        budget: str = "full",
        seed: int = 0,
        batch_size: int = 256,
        search: str = "plain",
    ) -> None:
        require_one_of("norm", norm, _BALLS)
        require_range("seed", seed, low=0)
        require_range("batch_size", batch_size, low=1)
        require_one_of("search", search, SEARCHES)
        self.ball = _BALLS[norm](epsilon)
        self.names = attack_names(version, attacks, budget)
        self.version = version
        self.budget = budget
        self.seed = seed
        self.batch_size = batch_size
        self.search = search

    def __call__(
        self, model: Forward, images: Array, labels: Array, *, progress: str | Path | None = None
    ) -> AutoAttackResult:
        """Attack every image.

        Args:
            model: images in [0, 1] -> logits (B, K); held in eval mode meanwhile and left as found. A callable
                that is no module is taken as it is.
            images: (N, C, H, W), N >= 1: floating point in [0, 1], or uint8 in 0..255.
            labels: integers (N,) in 0..K-1.
            progress: folder for finished pieces. Called again with the same model, images and settings, the
                evaluation goes on where it was interrupted and reaches the same verdicts.

        Raises:
            UserError: if images or labels do not fit, or the model's logits are not finite.
            CheckpointError: if `progress` belongs to another evaluation, or is damaged.
        """
        module = model if isinstance(model, nn.Module) else _Function(model, images)
        mode = check_mode(model)  # as it comes: below it is held in eval mode
        module, ((x, y),) = searchable(module, batches_for(module, images, labels, batch_size=sys.maxsize))
        with held_still(module):
            plain = MeanOf(module, EOT) if self.version == "rand" else module
            logits = self._clean(plain, x, y)
            correct = ~succeeded(logits, y)
            store = None
            if progress is not None:
                about = fingerprint(self._title(full=True), module, x, y, logits)
                store = workers().on_first(partial(Progress, progress, about))
            tally = Tally(x, y, logits, correct)
            searched = self._searched(module, x)
            for name in self.names:
                self._attack(name, searched, plain, tally, store)
            findings = workers().on_first(partial(self._checked, module, x, y, correct))
            findings[1] = mode
        return self._result(tally, findings)

    def _attack(self, name: str, searched: Forward, plain: Forward, tally: Tally, store: Progress | None) -> None:
        """One attack on all examples that are left, batch by batch."""
        attack = member(name, self.ball, version=self.version)
        parts = torch.split(tally.survivors(), self.batch_size)

        def done(number: int) -> Piece:
            piece, rows = None if store is None else store.load(name, number), parts[number]
            # After other verdicts of an attack before, of a piece computed again, it may be about other examples.
            if piece is None or not torch.equal(piece.get("rows", rows.cpu()), rows.cpu()):
                generator = generator_for(self.seed, name, number, device=tally.x.device)
                piece = attack_piece(attack, searched, plain, self.ball, tally.x[rows], tally.y[rows], generator)
                piece["rows"] = rows.cpu()
                if store is not None:
                    store.save(name, number, piece)
            return piece

        for rows, piece in zip(parts, workers().map(done, range(len(parts))), strict=True):
            tally.add(name, rows, piece)
        tally.close(name)

    def _checked(self, module: nn.Module, x: Tensor, y: Tensor, correct: Tensor) -> list[Finding]:
        """What does not look right about images, network and gradients."""
        generator = generator_for(self.seed, "sanity", device=x.device)
        findings = [check_range(x), *check_model(module, x)]
        return [*findings, *check_gradients(module, x[correct], y[correct], self.ball, generator)]

    def _clean(self, plain: Forward, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad(), exact_float32(x.device):
            logits = torch.cat(workers().map(partial(answer, plain), torch.split(x, self.batch_size))).to(x.device)
        require_answers(logits, y)
        if logits.shape[1] < 2:
            raise UserError("The model has one class: there is nothing to confuse it with.")
        check_images(x, y, logits.shape[1])
        return logits

    def _searched(self, module: nn.Module, x: Tensor) -> Forward:
        if self.search == "plain":
            return module
        return fast_copy(module, x[:32], self.search)

    def _title(self, *, full: bool = False) -> str:
        names = ", ".join(self.names)
        text = f"AutoAttack {self.version} ({names}), {describe(self.ball)}, search {self.search}"
        return f"{text}, budget {self.budget}, seed {self.seed}" + (f", batches of {self.batch_size}" * full)

    def _result(self, tally: Tally, findings: list[Finding]) -> AutoAttackResult:
        findings.append(check_verified(tally.refused, tally.misclassified))
        squares = [record for record in tally.records if record.name == "square"]
        if squares and self.names[-1] == "square" and len(self.names) > 1:
            tried, broken = (int(part.sum()) for part in (squares[0].tried, squares[0].broken))
            findings.append(check_black_box(tried, broken))
        partial = self.version != "rand" and not set(VERSIONS["standard"]) <= set(self.names)
        return tally.result(self._title(), report(findings), upper_bound=partial)


class AutoAttackSearch:
    """The same attacks as one attack object: images, labels -> `Found`, for evaluations, wrappers and flatness.

    Its result is a misclassified image where there is one, not the image of largest loss: use it for robust
    errors. Where there is none it is the final image with the largest objective.

    Args:
        ball: the allowed images.
        version, attacks, budget: as in `AutoAttack`.
        search: as in `AutoAttack`; "fp32" and "bf16" need a model that is a module.

    Raises:
        UserError: if a name is unknown, or two options contradict each other.
    """

    def __init__(
        self,
        ball: InputBall,
        *,
        version: str = "standard",
        attacks: Sequence[str] | None = None,
        budget: str = "full",
        search: str = "plain",
    ) -> None:
        require_one_of("search", search, SEARCHES)
        self.ball = ball
        self.names = attack_names(version, attacks, budget)
        self.version = version
        self.budget = budget
        self.search = search
        self.objective: Objective = cross_entropy

    def evaluation(self, *, seed: int = 0, batch_size: int = 128) -> AutoAttack:
        """The same attacks as an evaluation of a whole data set, which keeps every verdict."""
        made = AutoAttack(
            norm=self.ball.norm,
            epsilon=self.ball.epsilon,
            version=self.version,
            attacks=self.names if self.version == "custom" else None,
            budget=self.budget,
            seed=seed,
            batch_size=batch_size,
            search=self.search,
        )
        made.ball = self.ball  # its box may be another
        return made

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Attack images x (B, C, H, W) in [0, 1]; each attack sees what the ones before left.

        Raises:
            UserError: if x or y have the wrong shape or type, or the model cannot be rewritten.
        """
        check_shapes(x, y)
        if x.shape[0] == 0:
            return nothing_found(x)
        x = x.detach()
        goal = objective or self.objective
        with held_still(forward):
            plain = MeanOf(forward, EOT) if self.version == "rand" else forward
            clean = judge(plain, x, y, goal)
            best, value, fooled = x.clone(), clean.value.clone(), clean.fooled.clone()
            searched = self._searched(forward, x)
            for name in self.names:
                rows = (~fooled).nonzero().flatten()
                if len(rows) == 0:
                    break
                attack = member(name, self.ball, version=self.version)
                labels = labels_of(y)[rows]
                hunted = attack.hunt(searched, x[rows], labels, generator=generator, confirm=PlainJudge(plain))
                found = judge(plain, hunted.found.x_adv, y[rows], goal)
                better = hunted.found.fooled | (found.value > value[rows])
                take = rows[better]
                best[take], value[take] = found.x_adv[better], found.value[better]
                fooled[rows] = hunted.found.fooled
        return Found(best, value, fooled)

    def explain(self) -> Explanation:
        """The attacks in their order; what they cost depends on how soon examples break."""
        formula = f"x' = first success of {', '.join(self.names)}, each on the examples that the ones before left"
        return Explanation(formula, "Croce and Hein, ICML 2020", unknown_cost("AutoAttack"))

    def _searched(self, forward: Forward, x: Tensor) -> Forward:
        if self.search == "plain":
            return forward
        if not isinstance(forward, nn.Module):
            raise UserError(f"search={self.search} rewrites a model, but was given a plain function: use search=plain.")
        return fast_copy(forward, x[:32], self.search)


class _Function(nn.Module):
    """A plain function as a module, on the device of the images it is given."""

    def __init__(self, function: Forward, images: Array) -> None:
        super().__init__()
        self.function = function
        device = images.device if isinstance(images, Tensor) else torch.device("cpu")
        self.register_buffer("anchor", torch.zeros(1, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
