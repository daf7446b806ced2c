"""Which launcher a study takes, and that what the user says of it wins."""

from __future__ import annotations

import pytest

from robustflat.apps.launch import launcher_overrides


def last_of(overrides: list[str], key: str) -> str | None:
    """Value that Hydra would take: of equal keys the last counts."""
    return next((text.partition("=")[2] for text in reversed(overrides) if text.startswith(f"{key}=")), None)


@pytest.mark.parametrize(
    "given",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=3"],
        ["hydra.launcher.n_jobs=3", "hydra/launcher=joblib"],
    ],
)
def test_a_number_of_workers_given_by_the_user_wins_wherever_it_stands(given):
    overrides = launcher_overrides(given, jobs=None, waiting=8)
    assert last_of(overrides, "hydra.launcher.n_jobs") == "3"
    assert last_of(overrides, "hydra/launcher") == "joblib"


def test_no_more_workers_than_runs():
    overrides = launcher_overrides(["hydra/launcher=joblib"], jobs=6, waiting=2)
    assert last_of(overrides, "hydra.launcher.n_jobs") == "2"


def test_another_launcher_is_left_alone():
    given = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"]
    assert launcher_overrides(given, jobs=None, waiting=8) == given
