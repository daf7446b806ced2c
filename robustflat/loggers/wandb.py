"""Weights & Biases: online, offline or off, and never a reason for a run to stop."""

from __future__ import annotations

import importlib
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pandas as pd

from robustflat.errors import require_one_of
from robustflat.loggers.base import Null
from robustflat.types import Scalars

MODES = ("online", "offline", "disabled", "auto")
_INIT_SECONDS = 30.0
_FINISH_SECONDS = 120.0


class WandbLogger(Null):
    """Logs to Weights & Biases.

    Never asks for anything: without an account on this machine, or without network, the run is kept offline in
    `folder` and one line says so (`wandb sync <folder>` uploads it later). Any failure of W&B is reported once
    and switches this logger off; training goes on, and metrics.jsonl has everything.

    Args:
        project: W&B project.
        entity: W&B user or team; `None`: the account's own.
        mode: "online"; "offline"; "disabled"; "auto": the environment's WANDB_MODE, or online.
        group: runs shown together, such as the experiment.
        tags: labels of the run.
        folder: where W&B keeps its files; `None`: the working folder.
        run_id: id of the run, so that a resumed run goes on with the same curves; `None`: a new one.
        name: the run's name; `None`: W&B invents one.
        config: the run's configuration, plain values.

    Raises:
        UserError: for another mode.
    """

    def __init__(
        self,
        *,
        project: str = "robustflat",
        entity: str | None = None,
        mode: str = "online",
        group: str | None = None,
        tags: Sequence[str] = (),
        folder: str | Path | None = None,
        run_id: str | None = None,
        name: str | None = None,
        config: Mapping[str, object] | None = None,
    ) -> None:
        require_one_of("logger.mode", mode, MODES)
        self._run: Any = None
        chosen = _chosen_mode(mode)
        if chosen == "disabled":
            return
        settings = {
            "project": project,
            "entity": entity,
            "group": group,
            "tags": list(tags),
            "dir": None if folder is None else str(folder),
            "id": run_id,
            "name": name,
            "config": dict(config or {}),
            "resume": None if run_id is None else "allow",
        }
        if folder is not None:
            with suppress(OSError):  # W&B falls back to a temporary folder
                Path(folder).mkdir(parents=True, exist_ok=True)
        self._start(chosen, settings)

    @property
    def active(self) -> bool:
        """Whether anything is still logged to W&B."""
        return self._run is not None

    def log(self, metrics: Scalars, *, step: int) -> None:
        """Log named numbers at a step; W&B itself ignores steps that it has seen already."""
        self._guard(lambda: self._run.log(dict(metrics), step=step))

    def summary(self, metrics: Scalars) -> None:
        """Put the final numbers into the run's summary, which W&B's tables show."""
        self._guard(lambda: self._run.summary.update(dict(metrics)))

    def table(self, name: str, table: pd.DataFrame) -> None:
        """Log a table that W&B shows, sorts and plots; numbers stay numbers, anything missing is empty."""

        def send() -> None:
            plain = table.astype(object).where(table.notna(), None)
            made = importlib.import_module("wandb").Table(columns=[str(c) for c in plain], data=plain.values.tolist())
            self._run.log({name: made})

        self._guard(send)

    def finish(self, status: str) -> None:
        """Upload what is left and close; runs that are not "done" are marked as failed."""
        self._guard(lambda: self._run.finish(exit_code=0 if status == "done" else 1))
        self._run = None

    def _start(self, mode: str, settings: Mapping[str, Any]) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            _say(f"W&B is not used: {_first_line(error)}.")
            return
        if mode == "online":
            if _has_account(wandb):
                try:
                    self._run = _init(wandb, mode, settings)
                    _say(f"W&B: {self._run.url}")
                    return
                except Exception as error:
                    _say(f"W&B cannot be reached ({_first_line(error)}); keeping this run offline.")
                with suppress(Exception):
                    wandb.teardown()  # otherwise the id of the failed attempt counts as taken
            else:
                _say("W&B has no account on this machine (wandb login adds one); keeping this run offline.")
        try:
            self._run = _init(wandb, "offline", settings)
        except Exception as error:
            _say(f"W&B is not used: {_first_line(error)}.")

    def _guard(self, action: Callable[[], object]) -> None:
        """Do something with W&B; on any failure say so once and log no more there."""
        if self._run is None:
            return
        try:
            action()
        except Exception as error:
            self._run = None
            _say(f"W&B failed and is off from here on ({_first_line(error)}); metrics.jsonl has everything.")


def account() -> bool | None:
    """Whether W&B could log in on this machine without asking; `None` if the package cannot be imported."""
    try:
        return _has_account(importlib.import_module("wandb"))
    except ImportError:
        return None


def _init(wandb: Any, mode: str, settings: Mapping[str, Any]) -> Any:
    wishes = {
        "reinit": "finish_previous",  # else a run of a sweep would log into one that failed before it
        "init_timeout": _INIT_SECONDS,
        "finish_timeout": _FINISH_SECONDS,  # a network that is gone must not hold a finished run
        "silent": True,
        "console": "off",
        "disable_git": True,  # provenance.json has the commit
    }
    known = {name: value for name, value in wishes.items() if name in wandb.Settings.model_fields}
    return wandb.init(mode=mode, settings=wandb.Settings(**known), **settings)


def _chosen_mode(mode: str) -> str:
    """`auto` resolved; and nothing goes online where the environment forbids it."""
    wished = os.environ.get("WANDB_MODE", "online")
    wished = wished if wished in MODES else "online"
    if mode == "auto":
        return wished
    return wished if mode == "online" and wished != "auto" else mode


def _has_account(wandb: Any) -> bool:
    """Whether W&B can log in without asking: a key in the environment or for its host in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        host = urlparse(os.environ.get("WANDB_BASE_URL") or str(wandb.Settings().base_url)).hostname or ""
        path = os.environ.get("NETRC") or str(Path.home() / (".netrc" if os.name == "posix" else "_netrc"))
        return netrc.netrc(path).authenticators(host) is not None
    except Exception:  # no file, an unreadable one, or settings that W&B refuses: no account then
        return False


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _say(text: str) -> None:
    print(text, flush=True)
