"""Tables that set numbers side by side: parts of the robust loss, equal cost, and our numbers beside the paper's."""

from __future__ import annotations

from dataclasses import replace

from robustflat.reporting.correlation_ledger import correlation_ledger
from robustflat.reporting.correlation_result import plural
from robustflat.reporting.decomposition import compared_at_cost, decomposed
from robustflat.reporting.drawing import Missing
from robustflat.reporting.ledger import NOT_RUN, reproduction_ledger, runs_by_row, verdicts
from robustflat.reporting.paper import SOURCE
from robustflat.reporting.records import RunRecord, Study
from robustflat.reporting.report_tables import ReportTable, table_of
from robustflat.reporting.study_plots import Material


def parts_table(material: Material) -> ReportTable | Missing:
    """RLoss of every run as train value plus gap, and as early-stopped value plus what came after."""
    title = "Robust loss in parts"
    metric = _robust_loss(material)
    if not metric:
        return Missing("parts", title, "No run has RLoss at its last checkpoint.")
    frame = decomposed([run for run in material.study.runs if run.status != "failed"], metric)
    columns = {"label": "model", "seed": "seed", "last": "RLoss", "train": "train RLoss", "gap": "gap",
               "gap_stderr": "± gap", "early_stopped": "early-stopped RLoss", "after_best": "last minus early-stopped",
               "onset": "overfits after epoch", "note": "note", "run_id": "run"}  # fmt: skip
    shown = frame[list(columns)].rename(columns=columns).dropna(axis=1, how="all")
    rising = int(frame["onset"].notna().sum())
    caption = (
        f"RLoss on test is train RLoss plus gap, or early-stopped RLoss plus what came after, in nats. "
        f"{plural(rising, 'run')} with a final rise of RLoss over epochs."
    )
    return table_of(shown, "parts", title, caption, filters=True)


def cost_table(material: Material) -> ReportTable | Missing:
    """Runs by the compute of their training; which are beaten by nothing cheaper."""
    title = "RLoss at equal cost"
    runs = [run for run in material.study.runs if run.status != "failed"]
    metric = _robust_loss(material)
    if not metric or not any(len(run.ledger) for run in runs):
        return Missing("cost", title, "No run has both RLoss and a compute ledger.")
    frame = compared_at_cost(runs, metric)
    columns = {"label": "model", "seed": "seed", "value": "RLoss", "stderr": "±", "cost": "passes",
               "relative_cost": "relative cost", "efficient": "nothing as cheap is better", "note": "note",
               "run_id": "run"}  # fmt: skip
    shown = frame[list(columns)].rename(columns=columns)
    shown["nothing as cheap is better"] = ["yes" if efficient else "" for efficient in frame["efficient"]]
    caption = "Cost: forward plus backward passes of the training; relative to the cheapest model."
    return table_of(shown, "cost", title, caption, filters=True)


def _robust_loss(material: Material) -> str:
    """Name of the robust loss as the statistics take it: they look at the last checkpoint; "" without one."""
    quantity = material.quantities.get("robust_loss")
    return quantity.name.partition(" (")[0] if quantity is not None and material.study.checkpoint == "last" else ""


def reproduction(study: Study) -> tuple[ReportTable | Missing, ...]:
    """Our numbers beside the paper's and, where rows of its tables were run, our correlations beside its."""
    numbers = ledger_table(study)
    return (numbers,) if isinstance(numbers, Missing) else (numbers, correlation_table(study))


def correlation_table(study: Study) -> ReportTable | Missing:
    """The paper's correlations, in its tables and its text, beside ours."""
    columns = {"y": "of", "x": "with", "method": "coefficient", "models": "models", "ours": "ours", "low": "low",
               "high": "high", "p": "p", "paper_same": "paper, the same experiments", "paper_all": "paper, all 74",
               "published": "in its text", "verdict": "verdict"}  # fmt: skip
    found = correlation_ledger(_own(study))
    caption = (
        "Ours with 95 % intervals over models: over the runs that can be compared, else over all runs (other data). "
        "They agree where the paper's coefficient over the same experiments lies in our interval."
    )
    title = "Our correlations beside the paper's"
    return table_of(found[list(columns)].rename(columns=columns), "correlation_ledger", title, caption, digits=2)


def ledger_table(study: Study) -> ReportTable | Missing:
    """Our numbers beside those of Stutz et al. (ICCV 2021) for every row that was run; all rows in the downloads."""
    title = "Our numbers beside the paper's"
    ours = _own(study)
    if study.runs and not ours:
        return Missing(
            "ledger", title, f"These numbers are the paper's own ({SOURCE}), so there is nothing to compare."
        )
    if not any(runs_by_row(ours).values()):
        return Missing("ledger", title, "No run is named after a row of the paper's tables (conf/experiment/iccv21).")
    full = reproduction_ledger(ours)
    shown = full[full["verdict"] != NOT_RUN].drop(columns=["experiment"])
    caption = f"{verdicts(full)} Errors are fractions. Rows that were not run are only in the downloads."
    made = table_of(shown, "ledger", title, caption, filters=True, deferred=True)
    return replace(made, frame=full)


def _own(study: Study) -> list[RunRecord]:
    return [run for run in study.runs if run.provenance.get("source") != SOURCE]
