from .data_check import DataCheck
from .data_report import DataReport
from .diversity_report import DiversityReportHook
from .knn_evaluation import KNNEvaluationHook
from .nonfinite_sentinel import NonFiniteSentinel
from .redundant_token_masker import RedundantTokenMasker
from .run_manifest import RunManifest
from .stop_on_signal import StopOnSignal
from .whole_checkpoint import WholeCheckpointHook

__all__ = [
    'DataCheck', 'DataReport', 'DiversityReportHook', 'KNNEvaluationHook', 'NonFiniteSentinel', 'RedundantTokenMasker',
    'RunManifest', 'StopOnSignal', 'WholeCheckpointHook'
]
