from .hooks import (
    DataCheck,
    DataReport,
    DiversityReportHook,
    KNNEvaluationHook,
    NonFiniteSentinel,
    RedundantTokenMasker,
    RunManifest,
    StopOnSignal,
    WholeCheckpointHook,
)
from .loops import SeekableEpochLoop, SeekableIterLoop
from .optim import BFloat16OptimWrapper, LayerDecayOptimWrapperConstructor, auto_amp_optim_wrapper
from .runner import ResumableRunner
from .seeding import SeekableBatchSampler

__all__ = [
    'BFloat16OptimWrapper', 'DataCheck', 'DataReport', 'DiversityReportHook', 'KNNEvaluationHook',
    'LayerDecayOptimWrapperConstructor', 'NonFiniteSentinel', 'RedundantTokenMasker', 'ResumableRunner', 'RunManifest',
    'SeekableBatchSampler', 'SeekableEpochLoop', 'SeekableIterLoop', 'StopOnSignal', 'WholeCheckpointHook',
    'auto_amp_optim_wrapper'
]
