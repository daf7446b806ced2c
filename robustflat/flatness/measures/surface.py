"""The loss of one network as a function of a displacement of its weights: what every sharpness measure looks at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from robustflat.attacks.describe import describe
from robustflat.attacks.examples import Array, batches_for
from robustflat.attacks.objectives import cross_entropy
from robustflat.attacks.strongest import judged_logits
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.flatness.curvature_products import CurvatureProducts
from robustflat.flatness.directions import loss_and_gradient
from robustflat.flatness.hessian import frozen_batches
from robustflat.flatness.subject import Subject, misclassified, subject
from robustflat.models.modes import displaced, perturbable
from robustflat.rng import generator_for
from robustflat.types import Attack, Batch, Weights

LOSSES = ("clean", "frozen", "robust")


class LossSurface:
    """L(w + nu): mean cross-entropy over fixed examples, clean, frozen-adversarial, or attacked again at each nu.

    "frozen" finds adversarial examples once, at w. For the "robust" loss, gradients are those on the examples found at
    w + nu (Danskin), and curvature, which that loss does not have where the strongest example jumps, is that of the
    frozen one. Attacks use the same random draws at every nu.

    Args:
        model: images in [0, 1] -> logits; in eval mode inside, left as found.
        images, labels: (N, C, H, W) and (N,).
        loss: one of the above.
        attack: for the frozen and robust loss.
        norm_layers, biases: whether those parameters belong to w.
        batch_size: bounds memory. Attacks draw by batch, and average- and worst-case flatness displace every batch by
            itself, so it is part of these numbers.
        seed: of attacks and of all draws of the measures.
        anchors: state dicts of other networks that some measures compare with, by what they are: "start" (the weights
            that training began with), "other" (another network).

    Raises:
        UserError: if the model, images or labels cannot be measured, or loss and attack do not go together.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        images: Array,
        labels: Array,
        *,
        loss: str = "clean",
        attack: Attack | None = None,
        norm_layers: bool = False,
        biases: bool = True,
        batch_size: int = 128,
        seed: int = 0,
        anchors: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        require_one_of("loss", loss, LOSSES)
        require_range("seed", seed, low=0)
        if (loss == "clean") != (attack is None):
            raise UserError(f"loss='{loss}' {'uses no' if loss == 'clean' else 'needs an'} attack.")
        batches = batches_for(model, images, labels, batch_size=batch_size)
        found = subject(model, batches, norm_layers=norm_layers, biases=biases)
        fixed = found.batches if attack is None else frozen_batches(found, attack, seed)
        self._set(found, fixed, loss, attack, seed)
        self.parameters = found.described(norm_layers, biases)
        self.norm_layers, self.biases = norm_layers, biases
        self.anchors.update(anchors or {})

    def _set(self, found: Subject, fixed: list[Batch], loss: str, attack: Attack | None, seed: int) -> None:
        self.found, self.fixed, self.loss, self.attack, self.seed = found, fixed, loss, attack, seed
        self.weights = {name: w.clone() for name, w in found.weights.items()}
        self.passes = 0
        """Sweeps over the examples so far: forward passes, gradients (count 3) and curvature products (count 4)."""
        self.parameters = ""
        self.norm_layers, self.biases = False, True
        self.anchors: dict[str, Mapping[str, Tensor]] = {}

    @property
    def described(self) -> str:
        """The loss in words."""
        return f"{self.loss} loss" + ("" if self.attack is None else f", attack {describe(self.attack)}")

    def generator(self, *names: str | int) -> torch.Generator:
        """Fresh random stream for a measure."""
        return generator_for(self.seed, *names, device=self.found.device)

    @torch.no_grad()
    def logits(self, nu: Weights | None = None) -> Tensor:
        """Logits (N, K) at w + nu, on the images that the loss there is measured on."""
        self.passes += 1
        with displaced(self.found.model, nu or {}):
            return torch.cat([judged_logits(self.found.model, x) for x, _ in self._batches(nu)])

    @property
    def labels(self) -> Tensor:
        """Labels (N,)."""
        return torch.cat([batch.y for batch in self.fixed])

    def losses(self, nu: Weights | None = None) -> Tensor:
        """Loss of each example at w + nu, float64 (N,)."""
        return cross_entropy(self.logits(nu), self.labels).double()

    def value(self, nu: Weights | None = None) -> float:
        """Mean loss at w + nu."""
        return float(self.losses(nu).mean())

    def error(self, nu: Weights | None = None) -> float:
        """Fraction of examples misclassified at w + nu; logits that are not finite are wrong."""
        return float(misclassified(self.logits(nu), self.labels).double().mean())

    def slope(self, nu: Weights | None = None) -> tuple[float, Weights]:
        """Mean loss at w + nu and its gradient."""
        self.passes += 3
        with displaced(self.found.model, nu or {}):
            return loss_and_gradient(self.found.model, self._batches(nu), list(self.weights))

    def gradient_norm_slope(self, nu: Weights) -> tuple[float, Weights]:
        """|g| at w + nu, g the gradient of the loss there, and the gradient H g / |g| of that norm."""
        self.passes += 7
        with displaced(self.found.model, nu):
            products = CurvatureProducts(self.found.model, self._batches(nu), self.weights, precision="fp64")
            g = products.gradient()
            norm = g.norm()
            uphill = products.named(products(g / norm.clamp_min(torch.finfo(g.dtype).tiny)))
        return float(norm), {name: t.to(self.weights[name]) for name, t in uphill.items()}

    def products(self, *, curvature: str = "hessian", names: Sequence[str] | None = None) -> CurvatureProducts:
        """Products with the curvature at w, in float64, of the named weights or all."""
        chosen = self.weights if names is None else {name: self.weights[name] for name in names}
        return CurvatureProducts(
            self.found.model, self.fixed, chosen, curvature=curvature, precision="fp64", seed=self.seed
        )

    def parts(self, size: int) -> Iterator[LossSurface]:
        """Surfaces of `size` examples each, in order; the last may hold fewer."""
        x = torch.cat([batch.x for batch in self.found.batches])
        fixed = torch.cat([batch.x for batch in self.fixed])
        for own, still, y in zip(*(torch.split(t, size) for t in (x, fixed, self.labels)), strict=True):
            found = Subject(self.found.model, [Batch(own, y)], self.found.weights)
            yield self._on(found, [Batch(still, y)])

    def of(self, model: nn.Module) -> LossSurface:
        """The surface of another network on the same images with the same kinds of weights.

        Frozen images stay those of this surface; for the robust loss the other network is attacked at its own weights.
        """
        weights = perturbable(model, norm_layers=self.norm_layers, biases=self.biases)
        return self._on(Subject(model, self.found.batches, weights), self.fixed)

    def _on(self, found: Subject, fixed: list[Batch]) -> LossSurface:
        """A surface with the options of this one, and the given images where these do not depend on the weights."""
        other = LossSurface.__new__(LossSurface)
        if self.loss == "robust":
            assert self.attack is not None, "checked by the constructor"
            fixed = frozen_batches(found, self.attack, self.seed)  # with the draws that it is attacked with at any nu
        other._set(found, fixed, self.loss, self.attack, self.seed)
        other.parameters, other.norm_layers, other.biases = self.parameters, self.norm_layers, self.biases
        return other

    def _batches(self, nu: Weights | None) -> list[Batch]:
        """Images at the weights as they are now."""
        if self.loss != "robust" or nu is None:
            return self.fixed
        assert self.attack is not None, "checked by the constructor"
        return frozen_batches(self.found, self.attack, self.seed)


class NormalizedLogits(nn.Module):
    """A network whose logits z become (z - mean z) / |z - mean z|, so that no measure depends on their scale.

    Wrap a network in it for the logit-normalised variants of Andriushchenko et al. (ICML 2023).

    Args:
        network: images -> logits (B, K).
        temperature: logits are divided by it afterwards, > 0.
    """

    def __init__(self, network: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        require_range("temperature", temperature, low=0, low_open=True)
        self.network, self.temperature = network, temperature

    def forward(self, x: Tensor) -> Tensor:
        """Images -> normalised logits (B, K); equal logits become zeros."""
        z = self.network(x)
        z = z - z.mean(dim=1, keepdim=True)
        scaled: Tensor = z / (self.temperature * z.norm(dim=1, keepdim=True).clamp_min(1e-10))
        return scaled
