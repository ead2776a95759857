"""The report of a run: pictures, loss curves and one self-contained HTML page."""

from spdfq.report.page import write_report
from spdfq.report.pictures import write_pictures
from spdfq.report.sheet import check_sheet, write_sheet

__all__ = ["check_sheet", "write_pictures", "write_report", "write_sheet"]
