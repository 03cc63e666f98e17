"""Analyse updates of a base without training: section 3 and theorem 1 of the paper."""

from trans_peft.analysis.figures import draw_figures
from trans_peft.analysis.report import Table, analysis_json, tables, write_report
from trans_peft.analysis.updates import (
    Analysis,
    AnalysisSettings,
    BaseSide,
    UpdateAnalysis,
    analyse,
    public_rows,
)

__all__ = [
    "Analysis",
    "AnalysisSettings",
    "BaseSide",
    "Table",
    "UpdateAnalysis",
    "analyse",
    "analysis_json",
    "draw_figures",
    "public_rows",
    "tables",
    "write_report",
]
