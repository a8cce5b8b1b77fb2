"""HTML pages made from results, and the commands that end in one."""

from .cells import check_genes
from .headline import summarize
from .slide import write_evaluation, write_prediction_report, write_report
from .study import print_study, run_study_with_report, write_study_report

__all__ = [
    "check_genes",
    "write_evaluation",
    "print_study",
    "run_study_with_report",
    "write_prediction_report",
    "write_report",
    "summarize",
    "write_study_report",
]
