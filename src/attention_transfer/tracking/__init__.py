"""The MLflow view of the study: the only importer of mlflow, which is loaded when a function needs it.

The records under metrics/ are the truth. A run is shown live while it works (`start`), and `sync`
imports from the records whatever the view lacks, so that the view can be lost at no cost.
"""

from attention_transfer.tracking.runs import Tracker, Unshown, start
from attention_transfer.tracking.sync import SyncReport, sync
from attention_transfer.tracking.ui import check_free, serve
from attention_transfer.tracking.views import MAIN, links

__all__ = ["MAIN", "SyncReport", "Tracker", "Unshown", "check_free", "links", "serve", "start", "sync"]
