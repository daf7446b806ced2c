"""The ball of weight perturbations: one class for every norm, grouping and scale.

Weights and perturbations are dictionaries, name -> tensor of that parameter's shape (`types.Weights`). A *group*
is a set of entries that share one norm and one limit. Nothing here is differentiable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustflat.errors import UserError, require_one_of, require_range
from robustflat.geometry.numerics import normal, positive, uniform, wide
from robustflat.types import Weights

_GROUPINGS = ("global", "layer", "filter")
_SAMPLINGS = ("sphere", "ball", "uniform_norm")


class WeightBall:
    """All nu whose norm in every group g is at most the limit: ||nu_g|| <= radius * ||w_g||.

    The defaults are the ball of the paper: L2 norm per tensor, relative to the norm of that tensor. A group
    that is all zero (such as a new bias) has limit 0 if relative, so it does not move.

    >>> w = {"weight": torch.tensor([[3.0, 4.0]])}
    >>> WeightBall(0.5).project({"weight": torch.tensor([[0.0, 9.0]])}, w)
    {'weight': tensor([[0.0000, 2.5000]])}

    Args:
        radius: xi >= 0; a fraction of the norm of the weights if relative, else the limit itself.
        norm: 2 or infinity (the largest absolute entry; in YAML `.inf`).
        grouping: "global": all tensors together are one group; "layer": each tensor is one (biases too);
            "filter": each output filter (index of the first dimension) of tensors with more than two dimensions
            is one, and each other tensor as a whole.
        relative: whether the limit is in proportion to the norm of the group's weights.

    Raises:
        UserError: if radius is negative or not finite, or norm or grouping is not among the above.
    """

    def __init__(self, radius: float, norm: float = 2.0, grouping: str = "layer", relative: bool = True) -> None:
        require_range("radius", radius, low=0, high=math.inf, high_open=True)
        if norm not in (2, math.inf):
            raise UserError(f"norm must be 2 or infinity (in YAML .inf), got {norm!r}.")
        require_one_of("grouping", grouping, _GROUPINGS)
        self.radius = radius
        self.norm = float(norm)
        self.grouping = grouping
        self.relative = relative

    def __repr__(self) -> str:
        return (
            f"WeightBall(radius={self.radius:g}, norm={self.norm:g}, grouping={self.grouping!r}, "
            f"relative={self.relative})"
        )

    @torch.no_grad()
    def limits(self, w: Weights) -> Weights:
        """Allowed norm per group, name -> tensor that broadcasts to the parameter.

        It is 0-dim for "global" (the same value under every name) and "layer", and (F, 1, ...) for filters; at
        least float32.

        Args:
            w: the unperturbed weights; take them (or a copy) outside `displaced`.
        """
        if self.relative:
            return {name: self.radius * norm for name, norm in self._norms(w).items()}
        return {name: wide(w[name]).new_full(shape, self.radius) for name, shape in self._shapes(w).items()}

    @torch.no_grad()
    def sizes(self, nu: Weights) -> Weights:
        """Norm of nu per group, laid out like `limits`."""
        return self._norms(nu)

    @torch.no_grad()
    def project(self, nu: Weights, w: Weights) -> Weights:
        """Nearest point of the ball around w (Euclidean); groups inside come back bit for bit.

        L2: a group outside is scaled, nu_g * limit / ||nu_g||. Infinity: every entry is clamped.

        Args:
            nu: perturbation, not perturbed weights.
            w: the unperturbed weights, same names and shapes.

        Raises:
            UserError: if nu and w do not have the same names.
        """
        limits = self.limits(_matching(w, nu))
        if self.norm == math.inf:
            return {n: step.clamp(-limits[n], limits[n]).to(step.dtype) for n, step in nu.items()}
        norms = self._norms(nu)
        return {n: (step * shrinking(norms[n], limits[n])).to(step.dtype) for n, step in nu.items()}

    @torch.no_grad()
    def sample(
        self,
        w: Weights,
        generator: torch.Generator | None = None,
        surface: bool = True,
        sampling: str | None = None,
    ) -> Weights:
        """Random nu; each group is drawn independently of the others.

        Args:
            w: the unperturbed weights.
            generator: source of randomness; draws happen on its device.
            surface: uniform on the surface of each group's ball ("sphere"), else uniform inside ("ball").
            sampling: the same by name, and wins over `surface` if given: "sphere", "ball", or "uniform_norm":
                a Gaussian direction with a norm uniform in [0, limit), as the released code starts its attacks.

        Returns:
            nu with names, shapes, dtypes and devices of w.

        Raises:
            UserError: if sampling is none of the above.
        """
        sampling = sampling or ("sphere" if surface else "ball")
        require_one_of("sampling", sampling, _SAMPLINGS)
        cube = self.norm == math.inf and sampling != "uniform_norm"
        if cube:
            drawn = {name: 2 * uniform(t.shape, t, generator) - 1 for name, t in w.items()}
        else:
            drawn = {name: normal(t.shape, t, generator) for name, t in w.items()}
        factors = self.limits(w)
        if not (cube and sampling == "ball"):
            norms = self._norms(drawn)
            factors = {name: limit / positive(norms[name]) for name, limit in factors.items()}
            if sampling != "sphere":
                lengths = self._lengths(w, generator, to_the_root=sampling == "ball")
                factors = {name: factor * lengths[name] for name, factor in factors.items()}
        return {name: (drawn[name] * factors[name]).to(tensor) for name, tensor in w.items()}

    @torch.no_grad()
    def steepest(self, grad: Weights, w: Weights) -> Weights:
        """The nu of the ball with the largest <grad, nu>; it lies on the surface, and is 0 where grad is 0.

        L2: limit * grad_g / ||grad_g||; infinity: limit * sign(grad). One step of adversarial weight
        perturbation (grouping "layer") and of sharpness-aware minimisation (grouping "global", not relative); a
        ball of radius `step` gives the normalised steps of worst-case flatness.

        Args:
            grad: gradient with respect to each tensor of w.
            w: the unperturbed weights.

        Raises:
            UserError: if grad and w do not have the same names.
        """
        limits = self.limits(_matching(w, grad))
        if self.norm == math.inf:
            return {n: (slope.sign() * limits[n]).to(slope.dtype) for n, slope in grad.items()}
        norms = self._norms(grad)
        return {n: (slope * (limits[n] / positive(norms[n]))).to(slope.dtype) for n, slope in grad.items()}

    def _norms(self, v: Weights) -> Weights:
        """Norm of each group, laid out like `limits`."""
        wholes = tensor_norms(v, self.norm)
        if self.grouping == "filter":
            return {n: _row_norms(t, self.norm) if t.ndim > 2 else wholes[n] for n, t in v.items()}
        if self.grouping == "global" and v:
            first = next(iter(wholes.values()))
            total = _norm(torch.stack([norm.to(first) for norm in wholes.values()]), self.norm)
            return {name: total.to(norm.device) for name, norm in wholes.items()}
        return wholes

    def _shapes(self, w: Weights) -> dict[str, tuple[int, ...]]:
        """Shape of each entry of `limits`."""
        by_filter = self.grouping == "filter"
        return {n: (len(t), *[1] * (t.ndim - 1)) if by_filter and t.ndim > 2 else () for n, t in w.items()}

    def _lengths(self, w: Weights, generator: torch.Generator | None, *, to_the_root: bool) -> Weights:
        """Random fraction of the limit per group: u, or u^(1/d) for a group of d entries (uniform in L2)."""
        shapes = self._shapes(w)
        entries = {name: w[name].numel() // max(math.prod(shape), 1) for name, shape in shapes.items()}
        if self.grouping == "global" and w:
            entries = dict.fromkeys(w, sum(entries.values()))
            shared = uniform((), next(iter(w.values())), generator)
            drawn = {name: shared.to(tensor.device) for name, tensor in w.items()}
        else:
            drawn = {name: uniform(shape, w[name], generator) for name, shape in shapes.items()}
        if not to_the_root:
            return drawn
        return {name: u.pow(1 / max(entries[name], 1)) for name, u in drawn.items()}


def _matching(w: Weights, v: Weights) -> Weights:
    """`w`, after checking that `v` has its names."""
    if w.keys() != v.keys():
        missing, unknown = sorted(w.keys() - v.keys()), sorted(v.keys() - w.keys())
        raise UserError(
            "A perturbation or gradient must have the same names as the weights. "
            f"Missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}."
        )
    return w


def shrinking(norm: Tensor, limit: Tensor) -> Tensor:
    """Factor that brings a group of size `norm` down to `limit`; exactly 1 inside."""
    # What a projection returns may measure a few rounding errors above the limit; it must count as inside.
    slack = 1 + 8 * torch.finfo(norm.dtype).eps
    return torch.where(norm > limit * slack, limit / positive(norm), 1.0)


def tensor_norms(v: Weights, norm: float) -> Weights:
    """Norm of each tensor, 0-dim and at least float32."""
    tensors = [wide(t) for t in v.values()]
    if tensors and all(t.is_cuda for t in tensors):
        # One call for all: launching a kernel per tensor takes longer than the norms themselves.
        return dict(zip(v, torch._foreach_norm(tensors, norm), strict=True))
    # On a CPU a float32 sum over millions of entries is off by 1e-4; sums of row sums are not.
    return {n: _norm(_row_norms(t, norm) if t.ndim > 1 else t, norm) for n, t in zip(v, tensors, strict=True)}


def _row_norms(v: Tensor, norm: float) -> Tensor:
    """Norms over all but the first dimension, (F, ...) -> (F, 1, ...), at least float32."""
    return _norm(wide(v), norm, tuple(range(1, v.ndim)))


def _norm(v: Tensor, norm: float, dims: tuple[int, ...] | None = None) -> Tensor:
    result: Tensor = torch.linalg.vector_norm(v, norm, dim=dims, keepdim=dims is not None)
    return result
