"""scripts/plot_curves.py on runs that evaluate test examples only, and on a metrics file cut off by a kill."""

from __future__ import annotations

from scripts.plot_curves import best_epoch, described, evaluations

LINES = (
    '{"step": 2, "epoch": 1, "epoch/loss": 1.5}\n'
    '{"step": 2, "evaluation/test_robust_loss": 1.5, "evaluation/test_robust_error": 0.5}\n'
    '{"step": 4, "epoch": 2}\n'
    '{"step": 4, "evaluation/test_robust_loss": 1.25, "evaluation/test_robust_error": 0.4}\n'
    '{"step": 6, "ep'
)


def test_a_run_without_training_examples_is_described(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text(LINES)
    histories = [evaluations(tmp_path)]
    assert best_epoch(histories) == 2
    assert described(histories, 2) == ["test_robust_loss 1.250 +- nan", "test_robust_error 0.400 +- nan"]
