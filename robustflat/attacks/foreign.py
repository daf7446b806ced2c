"""Attacks of other libraries behind our contract, so that they can be evaluated and joined with ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustflat.attacks.inputs import check_box_on_cpu, check_shapes
from robustflat.attacks.judging import held_still, judge, nothing_found, own_objective
from robustflat.attacks.objectives import labels_of, objective_by_name
from robustflat.errors import UserError
from robustflat.explanation import FORWARD, Explanation, unknown_cost
from robustflat.geometry.input_ball import InputBall
from robustflat.types import Forward, Found, Objective

ForeignAttack = Callable[[Forward, Tensor, Tensor], Tensor]
"""(model, images (B, C, H, W) in [0, 1], labels (B,)) -> adversarial images of the same shape."""


class Foreign:
    """A foreign attack as one of ours: what it returns is projected onto ball and box and judged by the network.

    >>> theirs = Foreign(lambda model, x, y: foolbox_attack(model, x, y), LinfBall(8 / 255))  # doctest: +SKIP
    >>> WorstOf({"ours": Pgd(...), "theirs": theirs})  # doctest: +SKIP

    Its random draws are its own: torch's global generator is seeded from ours meanwhile and put back afterwards.

    Args:
        attack: callable (model, images, labels) -> adversarial images; an attack that already owns its model
            ignores the first argument.
        ball: where results must lie.
        objective: name of the value that is reported, and by which `WorstOf` compares.

    Raises:
        UserError: if `attack` cannot be called.
    """

    def __init__(self, attack: ForeignAttack, ball: InputBall, *, objective: str = "cross_entropy") -> None:
        if not callable(attack):
            raise UserError(f"Foreign needs a callable (model, images, labels) -> images, got {type(attack).__name__}.")
        self.attack = attack
        self.ball = ball
        self.objective = objective_by_name(objective)

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Run the foreign attack once; see `robustflat.types.Attack`.

        Raises:
            UserError: if it returns something else than images of the shape of x, or numbers that are not finite; on
                the CPU also for images outside the box.
        """
        check_shapes(x, y)
        if x.shape[0] == 0:
            return nothing_found(x)
        check_box_on_cpu(x, self.ball.low, self.ball.high)
        wanted = own_objective(self) if objective is None else objective
        seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device if generator else "cpu"))
        with held_still(forward):
            with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
                torch.manual_seed(seed)
                with torch.inference_mode(False), torch.enable_grad():
                    theirs = self.attack(forward, x.detach().clone(), labels_of(y).clone())
            x_adv = self.ball.project(self._checked(theirs, x), x)
            return judge(forward, x_adv, y, wanted)

    def rehearse(self, x: Tensor, generator: torch.Generator) -> bool:
        """Draw the seed; see `attacks.rehearsal`."""
        torch.randint(2**31, (1,), generator=generator, device=generator.device)
        return True

    def explain(self) -> Explanation:
        """Another library's search, whose passes are not known here, and a pass that judges its result."""
        name = getattr(self.attack, "__name__", type(self.attack).__name__)
        return Explanation(f"x' = project({name}(f, x, y))", cost=unknown_cost(name) + FORWARD)

    def _checked(self, theirs: object, x: Tensor) -> Tensor:
        if not isinstance(theirs, Tensor) or theirs.shape != x.shape:
            got = tuple(theirs.shape) if isinstance(theirs, Tensor) else type(theirs).__name__
            raise UserError(f"The foreign attack must return images of shape {tuple(x.shape)}, got {got}.")
        found = theirs.detach().to(x)
        if not bool(torch.isfinite(found).all()):
            raise UserError("The foreign attack returned numbers that are not finite.")
        return found
