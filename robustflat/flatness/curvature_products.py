"""Products of curvature matrices with vectors: Hessian, Gauss-Newton and Fisher, of the mean loss over batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.attacks.judging import held_still
from robustflat.errors import UserError, require_one_of
from robustflat.flatness.graphs import Graph, KeptGraphs
from robustflat.memory import MemoryBudget
from robustflat.models.double_backward import DoubleBackward
from robustflat.models.folded import WeightsForward, folded_forward
from robustflat.models.precision import exact_float32
from robustflat.rng import generator_for
from robustflat.types import Batch, Weights

CURVATURES = ("hessian", "gauss_newton", "fisher", "empirical_fisher")
REDUCTIONS = ("mean", "sum_over_batches")
PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}


class CurvatureProducts:
    """Maps row vectors v (k, n) to v C, where C (n, n) is the curvature of the cross-entropy in the given weights.

    * "hessian": second derivatives, by differentiating the gradient.
    * "gauss_newton": J^T S J with J the Jacobian of the logits and S = diag(p) - p p^T the Hessian of cross-entropy
      in the logits; positive semi-definite. For cross-entropy this *is* the Fisher matrix, expectation over
      the model's own labels taken exactly.
    * "fisher": the same expectation by one label drawn per example: the mean of g g^T, g the gradient for that label.
    * "empirical_fisher": the mean of g g^T with the true labels; away from a perfect fit, neither of the others.

    The model itself does not change: a copy in the wanted precision is differentiated, with batch norms folded
    into the layers before them (differentiably, see `folded_forward`) where that leaves the logits alone.

    Several vectors at once share the forward and first backward pass. The graphs of these are kept between calls, for
    as many batches as fit `memory_budget`. In convolutions and ReLUs (see `DoubleBackward`), a product then costs the
    arithmetic of 2 gradients, and 3 for a batch whose graph is not kept; 4/3 and 7/3 for the other curvatures. A graph
    takes the activations of the forward pass once or twice. Call `release` when done.

    Args:
        model: images -> logits; run in eval mode.
        batches: images and labels (B,) on the model's device; every batch may have its own size.
        weights: names (and shapes) of the n numbers that count, as `perturbable` returns them.
        curvature: one of the above.
        reduction: "mean" over all examples, or "sum_over_batches" of the batches' means, as released by Stutz et al.
        precision: "fp32" or "fp64".
        seed: of the labels drawn for "fisher".
        memory_budget: for graphs that are kept, in MiB; "auto": half of the free memory; `None`: no bound. It changes
            no number. A single batch's graph is kept in any case, since a call takes that memory anyway.

    Raises:
        UserError: if an option is unknown, or there is no batch.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        weights: Weights,
        *,
        curvature: str = "hessian",
        reduction: str = "mean",
        precision: str = "fp32",
        seed: int = 0,
        memory_budget: MemoryBudget = "auto",
    ) -> None:
        require_one_of("curvature", curvature, CURVATURES)
        require_one_of("reduction", reduction, REDUCTIONS)
        require_one_of("precision", precision, PRECISIONS)
        if not batches or not weights:
            raise UserError("Curvature needs at least one batch and one weight tensor.")
        self.model, self.curvature, self.seed = model, curvature, seed
        self.dtype = PRECISIONS[precision]
        self.batches = [Batch(x.to(self.dtype), y) for x, y in batches]
        self.names = list(weights)
        self.shapes = [w.shape for w in weights.values()]
        self.sizes = [w.numel() for w in weights.values()]
        self.device = self.batches[0].x.device
        total = sum(len(batch.y) for batch in self.batches)
        self._shares = [len(b.y) / total if reduction == "mean" else 1.0 for b in self.batches]
        chosen = [w.detach().to(self.dtype, copy=True) for w in self._chosen(model)]
        self._leaves = [w.requires_grad_() for w in chosen]
        self._forward = self._made_forward(model)
        self._kept = KeptGraphs(len(self.batches), memory_budget, self.device)
        self.count = 0
        """Products computed so far, one per vector."""

    @property
    def dimension(self) -> int:
        """n, how many weights there are."""
        return sum(self.sizes)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Products (k, n), or (n,) for one vector (n,); in this object's precision."""
        if vectors.shape[-1] != self.dimension or vectors.ndim > 2:
            raise UserError(f"vectors must have shape (k, {self.dimension}), got {tuple(vectors.shape)}.")
        rows = vectors.reshape(-1, self.dimension).to(self.dtype)
        result = torch.zeros_like(rows)
        with held_still(self.model), exact_float32(self.device), torch.enable_grad():
            for index, share in enumerate(self._shares):
                graph = self._graph(index)
                for row, total in zip(rows, result, strict=True):
                    total.add_(self._product(graph, row, index), alpha=share)
        self.count += len(rows)
        return result.reshape(vectors.shape)

    def gradient(self) -> Tensor:
        """Gradient (n,) of the loss, reduced like the curvature."""
        result = torch.zeros(self.dimension, dtype=self.dtype, device=self.device)
        with held_still(self.model), exact_float32(self.device), torch.enable_grad():
            for index, share in enumerate(self._shares):
                graph = self._graph(index)
                slopes = graph.slopes
                if graph.pulled is not None:  # not those of the loss
                    loss = F.cross_entropy(graph.logits, graph.labels)
                    slopes = torch.autograd.grad(loss, self._leaves, retain_graph=True, materialize_grads=True)
                result.add_(self._flat(slopes).detach(), alpha=share)
        return result

    def named(self, vector: Tensor) -> Weights:
        """A vector (n,) as name -> tensor of the weight's shape."""
        parts = torch.split(vector, self.sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def flat(self, weights: Weights) -> Tensor:
        """The reverse of `named`, (n,) in this object's precision."""
        return torch.cat([weights[name].reshape(-1).to(self.device, self.dtype) for name in self.names])

    def release(self) -> None:
        """Forget the graphs kept between calls."""
        self._kept.clear()

    def _chosen(self, model: nn.Module) -> list[Tensor]:
        known = dict(model.named_parameters(remove_duplicate=False))
        return [known[name] for name in self.names]

    def _made_forward(self, model: nn.Module) -> WeightsForward:
        """The network as a function of the weights, in this object's precision."""
        try:
            network = copy.deepcopy(model).to(self.dtype).eval().requires_grad_(False)
        except (RuntimeError, TypeError) as error:
            raise UserError(f"{type(model).__name__} cannot be copied to take its curvature ({error}).") from error
        with held_still(network), exact_float32(self.device):
            return folded_forward(network, self.batches[0].x[:2])

    def _graph(self, index: int) -> Graph:
        return self._kept.get(index, lambda: self._made_graph(index))

    def _made_graph(self, index: int) -> Graph:
        x, y = self.batches[index]
        jacobian = self.curvature != "hessian"
        with DoubleBackward(by_slopes=jacobian):
            logits = self._forward(dict(zip(self.names, self._leaves, strict=True)), x)
        # Pull back a dummy, then differentiate by it: that is J v, with backward passes alone.
        pulled = torch.zeros_like(logits, requires_grad=True) if jacobian else None
        value = logits if jacobian else F.cross_entropy(logits, y)
        slopes = torch.autograd.grad(value, self._leaves, pulled, create_graph=True, materialize_grads=True)
        return Graph(logits, y, slopes, pulled)

    def _product(self, graph: Graph, vector: Tensor, index: int) -> Tensor:
        directions = list(self.named(vector).values())
        if graph.pulled is None:
            return self._pulled_back(graph.slopes, directions)
        push = torch.zeros_like(graph.pulled)
        pairs = [(s, d) for s, d in zip(graph.slopes, directions, strict=True) if s.requires_grad]
        if pairs:
            outputs, along = zip(*pairs, strict=True)
            push = torch.autograd.grad(outputs, graph.pulled, along, retain_graph=True)[0]
        return self._pulled_back([graph.logits], [self._in_logits(graph, push, index)])

    @torch.no_grad()
    def _in_logits(self, graph: Graph, push: Tensor, index: int) -> Tensor:
        """Curvature of the batch's mean loss in the logits, times `push` (B, K)."""
        p = graph.logits.softmax(dim=1)
        if self.curvature == "gauss_newton":
            return (p * push - p * (p * push).sum(dim=1, keepdim=True)) / len(p)
        labels = graph.labels
        if self.curvature == "fisher":
            generator = generator_for(self.seed, "fisher", index, device=p.device)
            labels = torch.multinomial(p, 1, generator=generator).squeeze(1)
        slope = p - F.one_hot(labels, p.shape[1]).to(p)
        return slope * (slope * push).sum(dim=1, keepdim=True) / len(p)

    def _pulled_back(self, outputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
        """Sum over outputs of vector^T d output / d weights, (n,)."""
        pairs = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
        if not pairs:
            return torch.zeros(self.dimension, dtype=self.dtype, device=self.device)
        pulled = torch.autograd.grad(
            [o for o, _ in pairs], self._leaves, [v for _, v in pairs], retain_graph=True, materialize_grads=True
        )
        return self._flat(pulled)

    @staticmethod
    def _flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in tensors])
