"""Curvature of the loss in the weights: ends of the spectrum, trace, Frobenius norm and spectral density."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustflat.attacks.describe import describe
from robustflat.attacks.examples import Array, batches_for
from robustflat.attacks.strongest import strongest
from robustflat.errors import require_one_of, require_range
from robustflat.flatness.curvature_products import CURVATURES, PRECISIONS, REDUCTIONS, CurvatureProducts
from robustflat.flatness.lanczos import Eigenpairs, Ends, Lanczos, quadrature
from robustflat.flatness.reference import drawn_seed
from robustflat.flatness.spectrum_result import SpectralDensity, SpectrumResult
from robustflat.flatness.subject import Subject, subject
from robustflat.flatness.trace import ESTIMATORS, TraceEstimates, signs, trace_estimates
from robustflat.memory import MemoryBudget, require_memory_budget
from robustflat.ranks import workers
from robustflat.rng import generator_for
from robustflat.types import Attack, Batch


class HessianSpectrum:
    """Eigenvalues at both ends of the loss's curvature in the weights, with residual bounds, and estimates of the rest.

    The loss is the *mean* cross-entropy over all examples, whatever the batches. (The released code of Stutz et al.
    adds up the means of 4 batches, so its eigenvalues are about 4 times these: `reduction="sum_over_batches"`. Its
    weights were all tensors of more than one dimension: `biases=False`.)

    With an attack, the loss is that on adversarial examples found once, at these weights ("frozen"): the curvature
    of the re-attacked loss is another, and does not exist where the strongest example jumps.

    The other curvatures are positive semi-definite, and of networks with more weights than examples singular: their
    smallest eigenvalue is 0, of which no digit can converge, so ask for `bottom=0`.

    >>> result = HessianSpectrum(top=5, bottom=5, precision="fp64")(model, images, labels)  # doctest: +SKIP
    >>> print(result)  # doctest: +SKIP

    Cost: about 20 to 200 products for the ends, `trace_products` for the trace, and `density_steps` per probe of the
    density; each costs about two gradients over all examples, or three for batches that `memory_budget` excludes.

    Args:
        top, bottom: how many of the largest and smallest eigenvalues, >= 0.
        lanczos: tolerance, limit and memory of the search; `None`: `Lanczos()`.
        trace_products: for trace and Frobenius norm, >= 6 (hutchinson: 2); 0: neither.
        trace_estimator: "hutch++" or "hutchinson".
        density_probes: random vectors for the spectral density, >= 0.
        density_steps: of Lanczos' iteration for each of these, >= 2.
        curvature: "hessian", "gauss_newton", "fisher" or "empirical_fisher", see `CurvatureProducts`.
        precision: "fp32" or "fp64", whatever the network's own.
        reduction: "mean" over examples, or "sum_over_batches".
        attack: makes the adversarial examples; `None`: clean.
        norm_layers: include the parameters of normalisation layers.
        biases: include biases.
        seed: of all draws, >= 0.
        memory_budget: for what is kept between products, in MiB; "auto": half of the free memory; `None`: no bound.
            With enough for all batches a product costs 2 gradients instead of 3; no number depends on it.

    Raises:
        UserError: if an option is unknown or out of range.
    """

    def __init__(  # noqa: PLR0913  (the keys of one flat configuration node)
        self,
        *,
        top: int = 5,
        bottom: int = 5,
        lanczos: Lanczos | None = None,
        trace_products: int = 0,
        trace_estimator: str = "hutch++",
        density_probes: int = 0,
        density_steps: int = 60,
        curvature: str = "hessian",
        precision: str = "fp32",
        reduction: str = "mean",
        attack: Attack | None = None,
        norm_layers: bool = False,
        biases: bool = True,
        seed: int = 0,
        memory_budget: MemoryBudget = "auto",
    ) -> None:
        require_memory_budget(memory_budget)
        for name, value in (("top", top), ("bottom", bottom), ("density_probes", density_probes), ("seed", seed)):
            require_range(name, value, low=0)
        require_one_of("trace_estimator", trace_estimator, ESTIMATORS)
        require_range("density_steps", density_steps, low=2)
        if trace_products:
            low = 6 if trace_estimator == "hutch++" else 2
            require_range("trace_products", trace_products, low=low, hint="Write 0 for no trace.")
        require_one_of("curvature", curvature, CURVATURES)
        require_one_of("precision", precision, PRECISIONS)
        require_one_of("reduction", reduction, REDUCTIONS)
        self.top, self.bottom, self.lanczos = top, bottom, lanczos or Lanczos()
        self.trace_products, self.trace_estimator = trace_products, trace_estimator
        self.density_probes, self.density_steps = density_probes, density_steps
        self.curvature, self.precision, self.reduction = curvature, precision, reduction
        self.attack, self.norm_layers, self.biases, self.seed = attack, norm_layers, biases, seed
        self.memory_budget = memory_budget

    def __call__(self, model: nn.Module, images: Array, labels: Array, *, batch_size: int = 128) -> SpectrumResult:
        """Measure on images (N, C, H, W) and labels (N,); `batch_size` bounds memory; see `measure`.

        Raises:
            UserError: see `measure`.
        """
        return self.measure(model, batches_for(model, images, labels, batch_size=batch_size))

    @torch.inference_mode(False)
    def measure(
        self, model: nn.Module, batches: Sequence[Batch], *, generator: torch.Generator | None = None
    ) -> SpectrumResult:
        """Measure on batches in a fixed order.

        Args:
            model: images in [0, 1] -> logits; in eval mode inside, left as found.
            batches: un-augmented, with class labels.
            generator: takes the seed of this measurement from here instead of `seed`.

        Raises:
            UserError: if the model is not finite or not deterministic, more eigenvalues are wanted than there
                are weights, or a product is not finite.
        """
        start = time.perf_counter()
        seed = self.seed if generator is None else drawn_seed(generator)
        found = subject(model, batches, norm_layers=self.norm_layers, biases=self.biases)
        products = self.products(found, seed)
        like = torch.empty(products.dimension, dtype=products.dtype, device=products.device)
        ends = self._ends(products, like, seed)
        estimates = self._estimates(products, like, seed)
        density = self._density(products, like, seed)
        products.release()
        return SpectrumResult(
            top=_on_cpu(ends.top),
            bottom=_on_cpu(ends.bottom),
            converged=ends.converged,
            trace=estimates.trace if estimates else None,
            frobenius=estimates.frobenius if estimates else None,
            density=density,
            names=tuple(products.names),
            shapes=tuple(products.shapes),
            curvature=self.curvature,
            loss="clean" if self.attack is None else "frozen",
            reduction=self.reduction,
            precision=self.precision,
            parameters=found.described(self.norm_layers, self.biases),
            attack="none" if self.attack is None else describe(self.attack),
            examples=found.size,
            batches=len(found.batches),
            products=products.count,
            seed=seed,
            seconds=time.perf_counter() - start,
        )

    def products(self, found: Subject, seed: int) -> CurvatureProducts:
        """Products with the curvature of a checked subject, on clean or adversarial images."""
        return CurvatureProducts(
            found.model,
            found.batches if self.attack is None else frozen_batches(found, self.attack, seed),
            found.weights,
            curvature=self.curvature,
            reduction=self.reduction,
            precision=self.precision,
            seed=seed,
            memory_budget=self.memory_budget,
        )

    def _ends(self, products: CurvatureProducts, like: Tensor, seed: int) -> Ends:
        generator = generator_for(seed, "lanczos", device=like.device)
        start = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        if not self.top + self.bottom:
            none = Eigenpairs(like.new_zeros(0), like.new_zeros(0, like.numel()), like.new_zeros(0))
            return Ends(none, none, converged=True)
        return self.lanczos(products, start, top=self.top, bottom=self.bottom)

    def _estimates(self, products: CurvatureProducts, like: Tensor, seed: int) -> TraceEstimates | None:
        if not self.trace_products:
            return None
        generator = generator_for(seed, "trace", device=like.device)
        return trace_estimates(
            products, like, count=self.trace_products, generator=generator, estimator=self.trace_estimator
        )

    def _density(self, products: CurvatureProducts, like: Tensor, seed: int) -> SpectralDensity | None:
        if not self.density_probes:
            return None
        generator = generator_for(seed, "density", device=like.device)
        starts = signs((self.density_probes, like.numel()), like, generator)
        rules = [quadrature(products, start, self.density_steps) for start in starts]
        return SpectralDensity(torch.stack([r[0] for r in rules]).cpu(), torch.stack([r[1] for r in rules]).cpu())


def hessian_spectrum(
    model: nn.Module,
    images: Array,
    labels: Array,
    *,
    top: int = 5,
    bottom: int = 5,
    trace_products: int = 0,
    precision: str = "fp32",
    attack: Attack | None = None,
    norm_layers: bool = False,
    biases: bool = True,
    batch_size: int = 128,
    seed: int = 0,
) -> SpectrumResult:
    """Ends of the Hessian's spectrum of the mean cross-entropy, in one call; options as for `HessianSpectrum`.

    >>> print(hessian_spectrum(model, images, labels, top=3))  # doctest: +SKIP

    Args:
        model: images in [0, 1] -> logits; left as found.
        images: (N, C, H, W), floating point in [0, 1] or uint8.
        labels: integers (N,).
        top, bottom, trace_products, precision, attack, norm_layers, biases, seed: see `HessianSpectrum`.
        batch_size: bounds memory; it does not change the result.

    Raises:
        UserError: see `HessianSpectrum`.
    """
    measure = HessianSpectrum(
        top=top,
        bottom=bottom,
        trace_products=trace_products,
        precision=precision,
        attack=attack,
        norm_layers=norm_layers,
        biases=biases,
        seed=seed,
    )
    return measure(model, images, labels, batch_size=batch_size)


def frozen_batches(found: Subject, attack: Attack, seed: int) -> list[Batch]:
    """The subject's batches with adversarial images found at its present weights."""

    def attacked(index: int) -> Tensor:
        x, y = found.batches[index]
        generator = generator_for(seed, "reference", index, device=x.device)
        return strongest(found.model, x, y, attack, generator=generator).x_adv

    images = workers().map(attacked, range(len(found.batches)))
    return [Batch(x.to(found.device), y) for x, (_, y) in zip(images, found.batches, strict=True)]


def _on_cpu(pairs: Eigenpairs) -> Eigenpairs:
    return Eigenpairs(*(tensor.cpu() for tensor in pairs))
