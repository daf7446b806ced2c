"""The plain gradient: score one crafted batch at the current weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from robustflat.errors import UserError, require_range
from robustflat.explanation import Cost, Explanation
from robustflat.gradients.shared import backward
from robustflat.types import AdvBatch, LossTerms


class Plain:
    """Gradient of the loss at the weights as they are.

    Args:
        micro_batches: number of equal parts, >= 1, into which a crafted batch is cut; their gradients add up to
            the batch's gradient with the memory of one part. Batch norm then normalises each part by itself,
            so that a network with batch norm trains differently.

    Raises:
        UserError: if micro_batches < 1.
    """

    def __init__(self, *, micro_batches: int = 1) -> None:
        require_range("micro_batches", micro_batches, low=1)
        self.micro_batches = micro_batches

    def explain(self) -> Explanation:
        """The gradient at w."""
        parts = f", as the mean over {self.micro_batches} parts of the batch" if self.micro_batches > 1 else ""
        return Explanation(f"g = grad L(w){parts}")

    def step_cost(self, craft: Cost, score: Cost) -> Cost:
        """Crafting and scoring, once each."""
        return craft + score

    def __call__(
        self, model: nn.Module, next_batch: Callable[[], AdvBatch], loss: Callable[[AdvBatch], LossTerms]
    ) -> dict[str, Tensor]:
        """Add the gradient of one batch to `p.grad` of every trainable parameter of the model.

        Args:
            model: the network that `loss` scores.
            next_batch: crafts and returns the next batch.
            loss: scores a batch at the current weights.

        Returns:
            The parts of the loss, detached 0-dim tensors.

        Raises:
            UserError: if the batch does not split into `micro_batches` equal parts.
        """
        batch = next_batch()
        if self.micro_batches == 1:
            terms = loss(batch)
            backward(terms.total, model)
            return terms.parts
        size, rest = divmod(len(batch.x), self.micro_batches)
        if rest or not size:
            raise UserError(
                f"micro_batches must divide the batch size, got {self.micro_batches} for {len(batch.x)} images."
            )
        means: dict[str, Tensor] = {}
        for start in range(0, len(batch.x), size):
            rows = slice(start, start + size)
            terms = loss(AdvBatch(batch.x[rows], batch.x_adv[rows], batch.y[rows]))
            backward(terms.total / self.micro_batches, model)
            for name, value in terms.parts.items():
                means[name] = means.get(name, 0.0) + value / self.micro_batches
        return means
