"""List, filter, sort, compare and clean up run folders: the job behind `robustflat runs`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from robustflat.apps.compare import compare_runs
from robustflat.apps.config import differences, resolved
from robustflat.apps.messages import complain, wide_console
from robustflat.apps.networks import find_run, stored_config
from robustflat.apps.records import headline, is_complete, is_run, read_record
from robustflat.apps.run_folder import RunFolder
from robustflat.errors import UserError
from robustflat.reporting.records import RunRecord

OWN = ("run_id", "experiment", "label", "family", "seed", "status")
"""Facts of a run that `where` and `sort` know by name; other names are keys of its configuration."""

Choice = dict[str, Any]


@dataclass
class RunsRoot:
    """The top level of the configuration of `runs`."""

    where: Any = None
    sort: str | None = None
    compare: list[str] = field(default_factory=list)
    clean: bool = False
    confirm: bool = False
    outputs: str = "outputs"


ConfigStore.instance().store(name="runs_root", node=RunsRoot)


def job(config: DictConfig) -> None:
    """Hydra's task function: list runs, or compare two, or clean up.

    Args:
        config: the composed configuration.
    """
    console = wide_console()
    outputs = Path(str(config.outputs))
    try:
        if config.compare:
            for line in comparison([find_run(text, outputs) for text in config.compare]):
                console.print(line, markup=False)
            return
        records = sorted_by(found(outputs, condition_of(config.where)), config.sort)
        if config.clean:
            _clean(records, outputs, confirmed=bool(config.confirm), console=console)
            return
    except UserError as error:
        complain(str(error))
        sys.exit(1)
    console.print(listing(records))
    for record in records:
        if record.problem:
            console.print(f"{record.run_id} {record.status}: {record.problem}", markup=False)
    console.print(f"{len(records)} runs below {outputs}", markup=False)


def condition_of(where: Any) -> Choice:
    """What `where` asks for, by name: from "trainer.epochs=60 seed=0", or from a mapping.

    Raises:
        UserError: for a word that is no name=value.
    """
    if where is None:
        return {}
    if isinstance(where, str):
        words = where.split()
        wrong = [word for word in words if "=" not in word]
        if wrong:
            raise UserError(f"where: '{wrong[0]}' is no name=value; such as \"where='family=TRADES seed=0'\".")
        return {name: value for name, _, value in (word.partition("=") for word in words)}
    values = OmegaConf.to_container(where) if OmegaConf.is_config(where) else where
    if not isinstance(values, Mapping):
        raise UserError("where must be text such as 'family=TRADES seed=0', or +where.family=TRADES.")
    return flat({str(key): value for key, value in values.items()})


def flat(values: Mapping[str, Any], prefix: str = "") -> Choice:
    """Leaves of nested mappings by dotted name."""
    leaves: Choice = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and bool(value)
        leaves |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return leaves


def found(outputs: Path, wanted: Mapping[str, Any]) -> list[RunRecord]:
    """Records of the runs below a folder that meet all conditions; values may be patterns such as digits-*."""
    folders = sorted(path.parent for path in outputs.glob("*/*/identity.yaml"))
    return [record for record in map(read_record, folders) if _fits(record, wanted)]


def _fits(record: RunRecord, wanted: Mapping[str, Any]) -> bool:
    if not wanted:
        return True
    facts = _facts(record)
    return all(name in facts and _is(facts[name], value) for name, value in wanted.items())


def _is(fact: Any, wanted: Any) -> bool:
    """Whether a fact is what `where` says: the same value (true, null, 5e-4), the same text, or of that pattern."""
    text = str(wanted)
    return fact == _value(text) or str(fact) == text or fnmatchcase(str(fact), text)


def _value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return {"true": True, "false": False, "null": None}.get(text.lower(), text)


def _facts(record: RunRecord) -> Choice:
    """Everything that `where` may ask of a run: its command's overrides, its configuration, what it is called."""
    command = record.provenance.get("command")
    overrides = [str(text).lstrip("+").partition("=") for text in command] if isinstance(command, list) else []
    given = {name: value for name, _, value in overrides}
    return {**given, **_configuration(record), **{name: getattr(record, name) for name in OWN}}


def _configuration(record: RunRecord) -> Choice:
    assert record.folder is not None
    try:
        values = yaml.safe_load((record.folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return {}
    return flat(values) if isinstance(values, dict) else {}


def sorted_by(records: Sequence[RunRecord], name: str | None) -> list[RunRecord]:
    """Records by a headline figure such as RErr, or a fact such as label; "-RErr": largest first; None: as they are.

    Raises:
        UserError: if no run has such a figure or fact.
    """
    if name is None or not records:
        return list(records)
    key = name.removeprefix("-")
    values = [_sort_value(record, key) for record in records]
    if all(value is None for value in values):
        known = list(dict.fromkeys([*OWN, *(figure for record in records for figure in headline(record))]))
        raise UserError(f"sort: no run has '{key}'. There are {', '.join(known)}, and keys of the configuration.")
    have = sorted(
        (pair for pair in zip(values, records, strict=True) if pair[0] is not None),
        key=lambda pair: pair[0] or (False, 0.0, ""),
        reverse=name.startswith("-"),
    )
    return [record for _, record in have] + [r for v, r in zip(values, records, strict=True) if v is None]


def _sort_value(record: RunRecord, key: str) -> tuple[bool, float, str] | None:
    value = headline(record).get(key, _facts(record).get(key))
    if value is None:
        return None
    try:
        return False, float(str(value).removesuffix(" %")), ""
    except ValueError:
        return True, 0.0, str(value)


def listing(records: Sequence[RunRecord]) -> Table:
    """One line a run: what it is, headline figures, and status where it is not "done"."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    rows = [headline(record) for record in records]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for name in ("run", "label", "seed"):
        table.add_column(name, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("")
    for record, row in zip(records, rows, strict=True):
        seed = "" if record.seed is None else str(record.seed)
        state = "" if record.status == "done" else record.status
        cells = [record.run_id, record.label, seed, *(row.get(column, "") for column in columns), state]
        table.add_row(*(cell.replace("[", "\\[") for cell in cells))
    return table


def comparison(runs: Sequence[Path]) -> list[str]:
    """Differences of two runs, a line each: configuration, figures, then whether weights and metrics are equal.

    Raises:
        UserError: if there are not two runs, or one cannot be read.
    """
    if len(runs) != 2:
        raise UserError(f"compare takes two runs, compare=[<run>,<run>]; got {len(runs)}.")
    one, other = runs
    configurations = [resolved(stored_config(run)) for run in runs]
    lines = [f"first {one}", f"second {other}", "", "configuration (first there, second here):"]
    lines += [f"  {line}" for line in differences(configurations[0], configurations[1])] or ["  equal"]
    left, right = (_numbers(read_record(run)) for run in runs)
    lines += ["", "figures (first, second, second - first):"]
    for name in dict.fromkeys((*left, *right)):
        a, b = left.get(name), right.get(name)
        text = f"only in the {'second' if a is None else 'first'}"
        if a is not None and b is not None:
            text = f"{a:10.4g} {b:10.4g} {b - a:+10.4g}"
        lines.append(f"  {name}: {text}")
    lines += ["", "weights, state and metrics, bit for bit:"]
    different = compare_runs(one, other)
    more = [f"  ... and {len(different) - 10} more"] if len(different) > 10 else []
    return lines + ([f"  {line}" for line in different[:10]] or ["  equal"]) + more


_COMPARED = ("error", "loss", "robust_error", "robust_loss", "robust_loss_gap", "flatness")


def _numbers(record: RunRecord) -> dict[str, float]:
    table = record.table[record.table["metric"].isin(_COMPARED)]
    return {
        f"{row['checkpoint']} {row['split']} {row['measure']} {row['metric']}": float(row["value"])
        for row in table.to_dict("records")
    }


def _clean(records: Sequence[RunRecord], outputs: Path, *, confirmed: bool, console: Console) -> None:
    """Remove runs that did not end, or say which would be removed."""
    doomed = [record for record in records if record.folder is not None and not is_complete(record.folder)]
    for record in doomed:
        assert record.folder is not None
        if confirmed:
            try:
                remove(record.folder, outputs)
            except UserError as error:  # in use, for example: the others are removed
                console.print(str(error), markup=False)
                continue
        console.print(f"{'removed' if confirmed else 'would remove'} {record.folder}: {record.problem}", markup=False)
    if doomed and not confirmed:
        console.print("Nothing was removed. To remove these folders: confirm=true")
    if not doomed:
        console.print("There is no unfinished run.")


def remove(folder: Path, outputs: Path) -> None:
    """Remove the folder of a run whose training did not end.

    Raises:
        UserError: if it is not a run two levels below `outputs`, has finished training, holds results of a checkpoint
            from elsewhere, or is in use.
    """
    real, root = folder.resolve(), outputs.resolve()
    if folder.is_symlink() or real.parent.parent != root or not is_run(real):
        raise UserError(f"{folder} is not a run folder below {outputs}, and is left as it is.")
    if is_complete(real):
        raise UserError(f"{folder} is a finished run, and is left as it is.")
    opened = RunFolder(real, None)  # refuses if another process works in it
    try:
        shutil.rmtree(real)
    except OSError as error:
        raise UserError(f"Cannot remove {folder}: {error.strerror}.") from error
    finally:
        opened.close()
