"""The example report of the docs: the 74 networks of Stutz et al. (ICCV 2021), from the paper's own tables.

    python scripts/paper_report.py [--output docs/example]

Writes the page, its figures and tables, and study.svg, study.png: the two main figures side by side.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

from robustflat.reporting.figures import save
from robustflat.reporting.page import write_report
from robustflat.reporting.paper import GOOD, POOR, from_paper
from robustflat.reporting.records import Study
from robustflat.reporting.study_figure import study_figure


def paper_study() -> Study:
    """The paper as a study."""
    return Study(
        title="Robust generalisation and flat minima: the 74 networks of the paper",
        question="Do adversarially trained networks with flatter robust loss have lower robust loss on test examples?",
        runs=from_paper(),
        dataset="CIFAR-10",
        attack="PGD-20 with 10 restarts for RLoss, AutoAttack for RErr",
        parameters="displaced relative to the norm of each layer",
        classes=10,
        group_edges=(GOOD, POOR),
        notes=(
            "Numbers are those printed in Stutz et al., ICCV 2021 (supplement), rounded as there. Standard errors of "
            "errors are binomial and ours; the paper prints none.",
        ),
    )


def main() -> None:
    """Parse the command line, write, print where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/example"), help="folder of the page")
    folder = parser.parse_args().output
    study = paper_study()
    page = write_report(study, folder)
    written = save(study_figure(study), folder / "figures", "study")
    print(f"{page}: {page.stat().st_size / 2**20:.1f} MiB")
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
