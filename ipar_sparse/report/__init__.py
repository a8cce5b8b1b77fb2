"""HTML pages made from results, and the commands that end in one."""

from .slide import evaluate_slide, write_evaluation, write_report
from .study import print_study, run_study_with_report, write_study_report

__all__ = [
    "evaluate_slide",
    "write_evaluation",
    "print_study",
    "run_study_with_report",
    "write_report",
    "write_study_report",
]
