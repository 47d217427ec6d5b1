from collections.abc import Iterator

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from ...datasets import ImageFolder
from ...datasets.decode import CONVERTED
from ...datasets.image_folder import PROBLEMS
from ...registry import HOOKS
from .data_check import dataset_parts


@HOOKS.register_module()
class DataReport(Hook):
    """Tells how many images of each :class:`mmhdistill.datasets.ImageFolder` were skipped or converted.

    A data set marks what its workers find, and tells each class of problem once, with an example. Every ``interval``
    iterations, and at the end, the marks of all processes are put together: what others found is told too, and
    ``max_bad`` is of all. The totals are logged at the end of training, of validation and of testing, of what has been
    read until then. They are of images: one that several epochs read counts once. A run that goes on counts anew.

    Args:
        interval: iterations between two exchanges [choice]; one is a byte an image and class of problem.

    Raises:
        RuntimeError: more images are bad than ``max_bad`` of their data set allows.
    """

    def __init__(self, interval: int = 1000):
        if interval < 1:
            raise ValueError(f'interval={interval}: give at least 1 iteration.')
        self.interval = interval

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if self.every_n_train_iters(runner, self.interval):
            _gather(runner.train_dataloader.dataset)

    def after_train(self, runner: Runner) -> None:
        _finish(runner.train_dataloader.dataset)

    def after_val(self, runner: Runner) -> None:
        _finish(runner.val_dataloader.dataset)

    def after_test(self, runner: Runner) -> None:
        _finish(runner.test_dataloader.dataset)


def _folders(dataset) -> Iterator[ImageFolder]:
    return (part for part in dataset_parts(dataset) if isinstance(part, ImageFolder))


def _gather(dataset) -> None:
    for folder in _folders(dataset):
        # Bit by bit: NCCL knows no bitwise or, and a disk that fails may show each process another problem.
        found = torch.zeros_like(folder.marks)
        for bit in range(len(PROBLEMS)):
            part = (folder.marks >> bit & 1).to(torch.uint8)
            all_reduce(part, 'max')
            found |= part.to(torch.int32) << bit
        folder.merge_marks(found)


def _finish(dataset) -> None:
    _gather(dataset)
    for folder in _folders(dataset):
        counts = {problem: number for problem, (number, _) in folder.problems().items()}
        skipped = [f'{number} {problem}' for problem, number in counts.items() if problem not in CONVERTED]
        converted = [f'{number} {problem}' for problem, number in counts.items() if problem in CONVERTED]
        MMLogger.get_current_instance().info(
            f'{folder.img_prefix}: of {len(folder)} images {folder.num_bad()} could not be used '
            f'({", ".join(skipped) or "none"}); converted: {", ".join(converted) or "none"}; paths that could not be '
            f'listed: {len(folder.not_listed)}')
