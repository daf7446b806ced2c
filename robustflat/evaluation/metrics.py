"""Logits and labels in, numbers out: every metric of the reports, as pure functions.

N examples, K classes; *logits* (N, K), *labels* int64 (N,). Losses are cross-entropies in nats, accumulated in
float64 from logits, so that no loss is capped by a rounded probability. A figure over an empty set (the loss on
misclassified examples of a perfect model) is not-a-number, never a silent zero.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from robustflat.errors import UserError, require_range


class Interval(NamedTuple):
    """Ends of a confidence interval."""

    low: float
    high: float


class McNemar(NamedTuple):
    """Paired comparison of two models: how many examples only one of them gets wrong, and the p-value."""

    first_only_wrong: int
    second_only_wrong: int
    p_value: float


class PairedDifference(NamedTuple):
    """Mean difference of two models on the same examples, its confidence interval and p-value."""

    difference: float
    low: float
    high: float
    p_value: float


def _require_pair(logits: Tensor, labels: Tensor) -> None:
    """Refuse shapes that do not belong together, and labels without a column."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise UserError(
            f"Metrics take logits of shape (N, K) and labels of shape (N,), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if labels.numel() == 0:
        raise UserError("Metrics need at least one example, got none.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise UserError(
            f"Labels run from {low} to {high}, but the logits have {logits.shape[1]} classes "
            f"(allowed: 0 to {logits.shape[1] - 1}). Are model and data set meant for each other?"
        )


def wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """Which examples are misclassified, bool (N,); a tie goes to the first of the largest logits.

    Raises:
        UserError: if shapes or labels do not fit the logits.
    """
    _require_pair(logits, labels)
    return logits.argmax(dim=1) != labels


def robustly_wrong(clean: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
    """Which examples are wrong clean OR under attack, bool (N,): the released code's definition."""
    return wrong(clean, labels) | wrong(adversarial, labels)


def loss_per_example(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy log(sum_k exp z_k) - z_y of each example, float64 (N,).

    Raises:
        UserError: if shapes or labels do not fit the logits.
    """
    _require_pair(logits, labels)
    z = logits.double()
    return z.logsumexp(dim=1) - z.gather(1, labels[:, None]).squeeze(1)


def _mean(values: Tensor) -> float:
    """Mean in float64; not-a-number for an empty set."""
    return float(values.double().mean()) if values.numel() else math.nan


def error(logits: Tensor, labels: Tensor) -> float:
    """Fraction of misclassified examples, in [0, 1]."""
    return _mean(wrong(logits, labels))


def loss(logits: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy."""
    return _mean(loss_per_example(logits, labels))


def robust_error(clean: Tensor, adversarial: Tensor, labels: Tensor) -> float:
    """Fraction of examples that are wrong clean or under attack (RErr of the paper)."""
    return _mean(robustly_wrong(clean, adversarial, labels))


def robust_loss(adversarial: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy on the adversarial examples (RLoss of the paper)."""
    return loss(adversarial, labels)


def robust_loss_on_correct(clean: Tensor, adversarial: Tensor, labels: Tensor) -> float:
    """Robust loss over the examples that are classified correctly without attack; NaN if there are none."""
    return _mean(loss_per_example(adversarial, labels)[~wrong(clean, labels)])


def robust_loss_on_incorrect(clean: Tensor, adversarial: Tensor, labels: Tensor) -> float:
    """Robust loss over the examples that are wrong even without attack; NaN if there are none."""
    return _mean(loss_per_example(adversarial, labels)[wrong(clean, labels)])


def success_rate(clean: Tensor, adversarial: Tensor, labels: Tensor) -> float:
    """Fraction of the correctly classified examples that the attack turns wrong; NaN if there are none."""
    return _mean(wrong(adversarial, labels)[~wrong(clean, labels)])


def worst_restart(logits: Tensor, labels: Tensor) -> Tensor:
    """Per example, the restart with the highest cross-entropy.

    Args:
        logits: (R, N, K), one slice for each of R restarts.
        labels: (N,).

    Returns:
        (N, K) logits.

    Raises:
        UserError: if `logits` is not (R, N, K) or does not fit `labels`.
    """
    if logits.ndim != 3 or logits.shape[0] == 0:
        raise UserError(f"worst_restart takes logits of shape (R, N, K) with R >= 1, got {tuple(logits.shape)}.")
    losses = torch.stack([loss_per_example(restart, labels) for restart in logits])
    return logits[losses.argmax(dim=0), torch.arange(labels.numel())]


def generalization_gap(test: float, train: float) -> float:
    """Value on test examples minus value on training examples: positive where the model overfits."""
    return test - train


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of (N,) values, sqrt(variance / N) with N-1 in the variance; NaN for N = 1."""
    count = values.numel()
    return float(values.double().std(correction=1)) / math.sqrt(count) if count > 1 else math.nan


def wilson_interval(hits: int, count: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a proportion; unlike hits/count +- 2 sd it is right near 0 and 1.

    Args:
        hits: number of examples counted (say, errors), 0 <= hits <= count.
        count: number of examples, >= 1.
        confidence: coverage, in (0, 1).

    Raises:
        UserError: if a number is outside its range.
    """
    require_range("count", count, low=1)
    require_range("hits", hits, low=0, high=count)
    require_range("confidence", confidence, low=0.0, high=1.0, low_open=True, high_open=True)
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    p = hits / count
    centre = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (p * (1 - p) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    # At the ends the formula equals 0 or 1 up to rounding: never report an interval that leaves out hits/count.
    return Interval(0.0 if hits == 0 else centre - half, 1.0 if hits == count else centre + half)


def bootstrap_interval(
    values: Tensor, confidence: float = 0.95, *, resamples: int = 2000, generator: torch.Generator | None = None
) -> Interval:
    """Percentile bootstrap interval of the mean of per-example values.

    Args:
        values: (N,), any numbers (losses, errors, differences of two models on the same examples).
        confidence: coverage, in (0, 1).
        resamples: number of resampled sets, >= 1; they are drawn a few at a time, so memory stays small.
        generator: source of the draws; `None` takes a fixed one, so that a report never changes by itself.

    Raises:
        UserError: if there are no values or a number is outside its range.
    """
    return Interval(*_percentiles(_resampled_means(values, resamples, generator), confidence))


def _resampled_means(values: Tensor, resamples: int, generator: torch.Generator | None) -> Tensor:
    """Means of resampled sets, float64 (resamples,)."""
    require_range("resamples", resamples, low=1)
    if values.ndim != 1 or values.numel() == 0:
        raise UserError(f"A bootstrap takes (N,) values with N >= 1, got shape {tuple(values.shape)}.")
    source = values.detach().double().cpu()
    draws = torch.Generator().manual_seed(0) if generator is None else generator
    count, chunk = source.numel(), max(1, 4_000_000 // source.numel())
    return torch.cat(
        [
            source[torch.randint(count, (min(chunk, resamples - start), count), generator=draws)].mean(dim=1)
            for start in range(0, resamples, chunk)
        ]
    )


def _percentiles(means: Tensor, confidence: float) -> tuple[float, float]:
    """The middle `confidence` of the values."""
    require_range("confidence", confidence, low=0.0, high=1.0, low_open=True, high_open=True)
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = means.quantile(tails).tolist()
    return low, high


def paired_bootstrap(
    first: Tensor,
    second: Tensor,
    confidence: float = 0.95,
    *,
    resamples: int = 2000,
    generator: torch.Generator | None = None,
) -> PairedDifference:
    """Do two models differ in the mean of a per-example value, measured on the same examples?

    Examples are resampled in pairs, so what makes an example hard for both cancels.

    Args:
        first, second: (N,), values of the two models on the same examples in one order (losses, errors).
        confidence: coverage of the interval, in (0, 1).
        resamples: number of resampled sets, >= 1.
        generator: as in `bootstrap_interval`.

    Returns:
        Mean of first minus second, its percentile interval, and the two-sided p-value: twice the share of
        resampled differences on the other side of zero (at least 1 / resamples).

    Raises:
        UserError: if the two are not of one length, there are no values, or a number is outside its range.
    """
    if first.shape != second.shape:
        raise UserError(
            f"paired_bootstrap compares two models on the same examples, got shapes {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        )
    means = _resampled_means(first.double() - second.double(), resamples, generator)
    low, high = _percentiles(means, confidence)
    beyond = min(float((means <= 0).double().mean()), float((means >= 0).double().mean()))
    p_value = min(1.0, max(2 * beyond, 1 / resamples))
    return PairedDifference(_mean(first.double() - second.double()), low, high, p_value)


def confidences(logits: Tensor) -> Tensor:
    """Probability of the predicted class, float64 (N,)."""
    return logits.double().softmax(dim=1).amax(dim=1)


def threshold_at_tpr(logits: Tensor, labels: Tensor, rate: float) -> float:
    """Confidence threshold that keeps (at least) a fraction `rate` of the correctly classified examples.

    The value at index floor((1 - rate) n) of the n ascending confidences of correct examples.

    Raises:
        UserError: if rate is outside (0, 1], or no example is classified correctly.
    """
    require_range("rate", rate, low=0.0, high=1.0, low_open=True)
    kept = confidences(logits)[~wrong(logits, labels)].sort().values
    if kept.numel() == 0:
        raise UserError("threshold_at_tpr needs a correctly classified example; the model gets all of them wrong.")
    # Rounding keeps 1 - 0.9 from landing an ulp below 0.1.
    return float(kept[math.floor(kept.numel() * round(1 - rate, 9))])


def error_at_confidence(logits: Tensor, labels: Tensor, threshold: float) -> float:
    """Error among the examples whose confidence is at least `threshold`; 0 if there are none."""
    kept = confidences(logits) >= threshold
    return float((wrong(logits, labels) & kept).sum()) / max(int(kept.sum()), 1)


def robust_error_at_confidence(clean: Tensor, adversarial: Tensor, labels: Tensor, threshold: float) -> float:
    """Robust error where answers below a confidence are rejected; 0 if everything is.

    Errors are clean mistakes with clean confidence >= threshold, and adversarial mistakes with adversarial
    confidence >= threshold on examples that are correct clean. They are divided by the number of examples with
    clean confidence >= threshold, plus the correct ones below it whose adversarial version is a sure mistake.
    """
    clean_wrong = wrong(clean, labels)
    sure = confidences(clean) >= threshold
    fooled = wrong(adversarial, labels) & (confidences(adversarial) >= threshold) & ~clean_wrong
    mistakes = int(((clean_wrong & sure) | fooled).sum())
    return mistakes / max(int((sure | fooled).sum()), 1)


def roc_auc(positives: Tensor, negatives: Tensor) -> float:
    """Area under the ROC curve: chance that a positive scores above a negative, ties counting half.

    Returns:
        In [0, 1]; 1 if either set is empty (nothing can be confused).
    """
    if positives.numel() == 0 or negatives.numel() == 0:
        return 1.0
    ordered = negatives.flatten().sort().values
    scores = positives.flatten().to(ordered.dtype)
    below = torch.searchsorted(ordered, scores, side="left").double()
    up_to = torch.searchsorted(ordered, scores, side="right").double()
    return float(((below + up_to) / 2).mean()) / ordered.numel()


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean over examples of |accuracy - confidence| of the equally wide confidence bin they fall in.

    Raises:
        UserError: if bins < 1, or shapes do not fit.
    """
    require_range("bins", bins, low=1)
    confidence, correct = confidences(logits), (~wrong(logits, labels)).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bins are (i/bins, (i+1)/bins]
    surplus = torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add_(0, index, correct - confidence)
    return float(surplus.abs().sum()) / labels.numel()


def classwise(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean of per-example values (N,) over the examples of each class.

    Returns:
        float64 (classes,); not-a-number for a class without examples.

    Raises:
        UserError: if the lengths differ or a label is not below `classes`.
    """
    if values.shape != labels.shape or (labels.numel() and int(labels.max()) >= classes):
        raise UserError(
            f"classwise takes values and labels of one length and labels below {classes}, got shapes "
            f"{tuple(values.shape)} and {tuple(labels.shape)}."
        )
    sums = torch.zeros(classes, dtype=torch.float64, device=values.device).index_add_(0, labels, values.double())
    return sums / torch.bincount(labels, minlength=classes)


def classwise_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Error of each class, float64 (K,); not-a-number for a class without examples."""
    return classwise(wrong(logits, labels), labels, logits.shape[1])


def mcnemar_test(first_wrong: Tensor, second_wrong: Tensor) -> McNemar:
    """Exact McNemar test: do two models differ in error on the same examples?

    Under the null hypothesis, each example that exactly one model gets wrong is a fair coin.

    Args:
        first_wrong, second_wrong: bool (N,), mistakes of the two models on the same examples in one order.

    Raises:
        UserError: if the two are not of one length.
    """
    if first_wrong.shape != second_wrong.shape or first_wrong.ndim != 1:
        raise UserError(
            f"mcnemar_test compares two models on the same examples, got shapes {tuple(first_wrong.shape)} and "
            f"{tuple(second_wrong.shape)}."
        )
    first = int((first_wrong & ~second_wrong).sum())
    second = int((second_wrong & ~first_wrong).sum())
    return McNemar(first, second, min(1.0, 2 * _fair_coin_tail(min(first, second), first + second)))


def _fair_coin_tail(hits: int, flips: int) -> float:
    """Chance of at most `hits` heads in `flips` fair flips, in exact integers until the last division."""
    ways, total = 1, 0
    for heads in range(hits + 1):
        total += ways
        ways = ways * (flips - heads) // (heads + 1)
    return float(total / 2**flips)
