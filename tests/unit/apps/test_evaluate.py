"""What an evaluation returns to a sweeper."""

from __future__ import annotations

import math

from robustflat.apps.evaluate import headline_error


def test_the_first_attack_on_test_examples_of_the_last_network_counts() -> None:
    rows = [
        {"metric": metric, "role": role, "checkpoint": checkpoint, "measure": measure, "value": value}
        for checkpoint, metric, role, measure, value in (
            ("epoch_0005", "robust_error", "test", "pgd20", 0.1),
            ("last", "error", "test", "clean", 0.2),
            ("last", "robust_error", "test", "pgd20", 0.3),
            ("last", "robust_error", "train", "pgd20", 0.4),
            ("last", "robust_error", "test", "autoattack", 0.5),
        )
    ]
    assert headline_error(rows) == 0.3
    assert math.isnan(headline_error(rows[1:2]))
