"""Results of many runs as one table: Parquet, CSV, Markdown or LaTeX.

    python scripts/export.py outputs/*/*                                  all numbers -> outputs/tables/metrics.parquet
    python scripts/export.py outputs/digits-at/* --output table.md --wide --metrics robust_error robust_loss flatness
    python scripts/export.py outputs/*/* --output -                       Markdown on the screen

Parquet tables grow: rows of the runs given replace what the table says of them, other rows stay (--new: they go).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

import pandas as pd

from robustflat.apps.collect import RESULTS, rows_of_run
from robustflat.errors import UserError, require_one_of
from robustflat.store.tables import as_text, combined, read_table, tidy, wide, write_table


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, collect, write; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help=f"run folders; those without {RESULTS} are left out")
    parser.add_argument("--output", default="outputs/tables/metrics.parquet", help=".parquet, .csv, .md, .tex, or -")
    parser.add_argument("--metrics", nargs="*", default=[], help="keep these metrics, such as robust_error flatness")
    parser.add_argument("--checkpoints", nargs="*", default=[], help="keep these, such as last early_stopped")
    parser.add_argument("--wide", action="store_true", help="one line for each network (not for Parquet)")
    parser.add_argument("--new", action="store_true", help="forget what the Parquet table held")
    parser.add_argument("--digits", type=int, default=4, help="significant digits of Markdown and LaTeX")
    given = parser.parse_args(arguments)
    try:
        print(export(given), file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def export(given: argparse.Namespace) -> str:
    """Write the table that the command line asks for; one line on what was done.

    Raises:
        UserError: if no run has results, no row is of a metric or checkpoint that was asked for, a file is damaged, or
            the table cannot be written.
    """
    runs = [run for run in given.runs if (run / RESULTS).is_file()]
    if not runs:
        raise UserError(f"None of the {len(given.runs)} folders has a {RESULTS}: python evaluate.py run=<folder>.")
    table = tidy(row for run in runs for row in rows_of_run(run))
    if table.empty:
        raise UserError(f"The {RESULTS} of these runs hold no errors and no measures: python evaluate.py run=<folder>.")
    table = selected(table, given)
    if given.wide:
        table = wide(table)
    if given.output == "-":
        print(as_text(table, "md", digits=given.digits), end="")
    elif given.output.endswith(".parquet"):
        if given.wide:
            raise UserError("Parquet holds the tidy table: leave --wide out, or choose .csv, .md or .tex.")
        there = Path(given.output).exists() and not given.new
        table = combined(read_table(given.output), table) if there else table
        write_table(table, given.output)
    else:
        write_table(table, given.output, digits=given.digits)
    left = sum(run.is_dir() for run in given.runs) - len(runs)
    return f"{given.output}: {len(table)} rows from {len(runs)} runs" + (
        f", {left} without results (evaluate.py makes them)" if left else ""
    )


def selected(table: pd.DataFrame, given: argparse.Namespace) -> pd.DataFrame:
    """The rows that --metrics and --checkpoints keep.

    Raises:
        UserError: for a name that no row has.
    """
    for column, kept in (("metric", given.metrics), ("checkpoint", given.checkpoints)):
        for name in kept:
            require_one_of(f"--{column}s", name, set(table[column]))
        if kept:
            table = table[table[column].isin(kept)]
    return table.reset_index(drop=True)


if __name__ == "__main__":
    sys.exit(main())
