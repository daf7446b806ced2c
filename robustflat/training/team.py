"""What a training loop does differently where several processes share its batches; nothing where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustflat.errors import UserError
from robustflat.models.synchronised import synchronised
from robustflat.ranks import current
from robustflat.rng import Rows, holding
from robustflat.types import Batch


def share_of(total: int, rank: int, size: int) -> Rows:
    """The rows of a batch of `total` that a rank works on.

    Neighbours by twos are dealt in turn, so that each share has as much of the first half of the batch as of the
    second, and as many rows of even number as of odd: methods treat halves of both kinds differently. Where a share
    is not even, single rows are dealt.
    """
    pack = 2 if total // size % 2 == 0 else 1
    return Rows(tuple(n for n in range(total) if n // pack % size == rank), total)


class Team:
    """The ranks that train one network together, each on its share of every batch.

    Every rank reads the same endless stream with the same random state, so that what a checkpoint holds is the state
    of a single process. Losses are means over examples: the mean over equal shares of their means is that of the batch.

    Args:
        sync_batch_norm: whether batch norm uses the statistics of the whole batch (then a training equals that of a
            single process up to rounding), or each share its own, whose running statistics are averaged after a step.
        batch_size: examples of a batch, if known; one that cannot be shared is refused at once.

    Raises:
        UserError: if the batch cannot be shared equally.
    """

    def __init__(self, *, sync_batch_norm: bool = True, batch_size: int | None = None) -> None:
        self.ranks = current()
        self.sync_batch_norm = sync_batch_norm
        if batch_size is not None:
            self._require_equal_shares(batch_size)

    def share(self, batch: Batch) -> Batch:
        """Of a batch, the examples that this rank works on."""
        if self.ranks.size == 1:
            return batch
        self._require_equal_shares(len(batch.x))
        rows = share_of(len(batch.x), self.ranks.rank, self.ranks.size)
        return Batch(rows.of(batch.x), rows.of(batch.y))

    @contextmanager
    def working(self, model: nn.Module, count: int) -> Iterator[None]:
        """Inside, `count` examples are this rank's share: random draws and batch norm are those of the whole batch."""
        if self.ranks.size == 1:
            yield
            return
        rows = share_of(count * self.ranks.size, self.ranks.rank, self.ranks.size)
        with holding(rows), synchronised(model, batch_norm=self.sync_batch_norm):
            yield

    def working_on_part(self, count: int, of: int) -> None:
        """Refuse to score `count` of this rank's `of` examples if the ranks' parts together are no part of the batch.

        Raises:
            UserError: for an odd part of an even share, which was dealt by twos.
        """
        if self.ranks.size > 1 and count != of and count % 2 != of % 2:
            raise UserError(
                f"micro_batches leaves {count} of the {of} examples of each process: with several processes the parts "
                "must be even. Choose another number of micro_batches, or another dataset.batch_size."
            )

    def mean(self, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Values to log, 0-dim: means over all ranks' shares."""
        if self.ranks.size == 1:
            return parts
        values = self.ranks.means([value.double() for value in parts.values()])
        return {name: mean.to(value.dtype) for (name, value), mean in zip(parts.items(), values, strict=True)}

    def settle(self, model: nn.Module) -> None:
        """After a step: give all ranks the same running statistics, their mean, where these were not synchronised."""
        if self.ranks.size > 1 and not self.sync_batch_norm:
            layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
            self.ranks.mean_(
                [b for layer in layers for b in layer.buffers(recurse=False) if b.is_floating_point()],
            )

    def begin(self, model: nn.Module) -> None:
        """Give all ranks the first one's weights and statistics."""
        self.ranks.broadcast_(model.state_dict().values())

    def require_in_step(self, model: nn.Module) -> None:
        """Refuse to go on with weights or statistics that differ between the ranks.

        Raises:
            UserError: if they do.
        """
        if not self.ranks.same(model.state_dict().values()):
            raise UserError(
                "The processes have come to different weights. A gradient rule of your own must take the gradient with "
                "robustflat.gradients.shared.backward, and callbacks must do the same on all processes."
            )

    def _require_equal_shares(self, count: int) -> None:
        size = self.ranks.size
        if count % size:
            below, above = count // size * size, (count // size + 1) * size
            sizes = f"{below} or {above}" if below else str(above)
            raise UserError(
                f"A batch of {count} examples (dataset.batch_size counts those of all processes together) cannot be "
                f"shared equally by {size} processes: take {sizes}."
            )
