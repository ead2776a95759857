"""What a run leaves to look at: pictures, loss curves and one self-contained HTML page."""

from spdfq.report.page import write_report
from spdfq.report.pictures import write_pictures
from spdfq.report.sheet import write_sheet

__all__ = ["write_pictures", "write_report", "write_sheet"]
