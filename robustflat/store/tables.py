"""Tidy tables over many runs: one number a row, in Parquet; CSV, Markdown and LaTeX for people.

Tables are derived from the results files and can be thrown away; docs/results.md explains the columns.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from robustflat.errors import DataError, UserError, require_one_of

COLUMNS: Mapping[str, str] = {
    "run_id": "string",
    "experiment": "string",
    "seed": "Int64",
    "checkpoint": "string",
    "epoch": "Int64",
    "split": "string",
    "kind": "string",
    "measure": "string",
    "metric": "string",
    "radius": "float64",
    "value": "float64",
    "stderr": "float64",
    "low": "float64",
    "high": "float64",
    "count": "Int64",
    "norm": "string",
    "epsilon": "float64",
    "loss": "string",
    "protocol": "string",
    "precision": "string",
    "version": "string",
    "key": "string",
}
"""Column -> pandas type. What does not apply is missing (NA, NaN)."""

FORMATS = ("parquet", "csv", "md", "tex")
_IDENTITY = ["run_id", "checkpoint", "split", "kind", "measure", "metric", "key"]


def tidy(rows: Iterable[Mapping[str, object]]) -> pd.DataFrame:
    """Rows as a table with exactly the columns of `COLUMNS`; absent values become missing.

    Raises:
        UserError: if a row has a key that is no column.
    """
    listed = [dict(row) for row in rows]
    unknown = {key for row in listed for key in row} - COLUMNS.keys()
    if unknown:
        raise UserError(f"Not columns of the table: {', '.join(sorted(unknown))}. Columns: {', '.join(COLUMNS)}.")
    columns = {name: pd.Series([row.get(name) for row in listed], dtype=kind) for name, kind in COLUMNS.items()}
    return pd.DataFrame(columns)


def combined(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Both tables, where rows of `new` replace rows of `old` about the same number of the same run."""
    if old.empty or new.empty:
        return new if old.empty else old
    return pd.concat([old, new], ignore_index=True).drop_duplicates(_IDENTITY, keep="last", ignore_index=True)


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a Parquet table written by `write_table`.

    Raises:
        DataError: if it is missing, damaged, or has other columns.
    """
    try:
        table = pd.read_parquet(path)
    except FileNotFoundError as error:
        raise DataError(f"There is no table {path}.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or not a Parquet file ({str(error).splitlines()[0]}).") from error
    if list(table.columns) != list(COLUMNS):
        raise DataError(f"{path} has the columns {', '.join(map(str, table.columns))}; expected {', '.join(COLUMNS)}.")
    return table.astype(dict(COLUMNS))


def write_table(table: pd.DataFrame, path: str | Path, *, digits: int = 4) -> None:
    """Write a table in the format that the file's ending names, whole or not at all.

    Args:
        table: any table for csv, md and tex; for parquet one of `tidy`.
        path: file ending in .parquet, .csv, .md or .tex; its folder is made if needed.
        digits: significant digits in md and tex.

    Raises:
        UserError: for another ending, or if the file cannot be written.
    """
    path = Path(path)
    ending = path.suffix.removeprefix(".")
    require_one_of("The ending of a table's file", ending, FORMATS)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if ending == "parquet":
            table.to_parquet(temporary, index=False)
        else:
            temporary.write_text(as_text(table, ending, digits=digits), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def as_text(table: pd.DataFrame, ending: str, *, digits: int = 4) -> str:
    """A table as csv (full precision), md or tex (`digits` significant digits).

    Raises:
        UserError: for another format.
    """
    require_one_of("The format of a table", ending, FORMATS[1:])
    if ending == "csv":
        return str(table.to_csv(index=False))
    cells = [[_cell(value, digits) for value in row] for row in table.itertuples(index=False)]
    return _markdown(list(table.columns), cells) if ending == "md" else _latex(list(table.columns), cells)


def wide(table: pd.DataFrame, *, rows: Sequence[str] = ("experiment", "run_id", "checkpoint")) -> pd.DataFrame:
    """One line per network: a column for every measure, metric and split that the tidy table has.

    Where one number was measured twice with different settings, the one written last counts.

    Args:
        table: from `tidy`.
        rows: columns that tell networks apart.

    Raises:
        UserError: if `rows` are not columns.
    """
    for name in rows:
        require_one_of("A column", name, COLUMNS)
    if table.empty:
        return pd.DataFrame(columns=list(rows))
    kept = table.assign(name=[_column_name(*parts) for parts in zip(
        table["measure"], table["metric"], table["split"], strict=True)])  # fmt: skip
    order = list(dict.fromkeys(kept["name"]))
    found = kept.pivot_table(index=list(rows), columns="name", values="value", aggfunc="last", sort=False)
    return found[[name for name in order if name in found]].reset_index().rename_axis(columns=None)


def _column_name(measure: str, metric: str, split: str) -> str:
    name = metric if measure == "clean" else f"{measure} {metric}"
    return f"{name} ({split})"


def _cell(value: object, digits: int) -> str:
    if value is None or value is pd.NA or value != value:
        return ""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _markdown(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    def line(parts: Sequence[str]) -> str:
        return "| " + " | ".join(part.replace("|", "\\|").replace("\n", " ") for part in parts) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, cells)]) + "\n"


_LATEX_SIGNS = str.maketrans(
    {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {sign: f"\\{sign}" for sign in "&%$#_"}
)


def _latex(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    def line(parts: Sequence[str]) -> str:
        return " & ".join(part.replace("\n", " ").translate(_LATEX_SIGNS) for part in parts) + r" \\"

    body = [line(columns), r"\hline", *map(line, cells)]
    return "\n".join([rf"\begin{{tabular}}{{{'l' * len(columns)}}}", *body, r"\end{tabular}"]) + "\n"
