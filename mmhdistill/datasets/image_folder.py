import math
import os
import random
from collections.abc import Iterator

import torch
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.logging import MMLogger
from mmpretrain.datasets import CustomDataset

from ..registry import DATASETS
from .decode import CONVERTED, SKIPPED, BadImage, read_image
from .listing import list_folders, list_images, printable

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.gif', '.webp')
PROBLEMS = (*SKIPPED, *CONVERTED)
_SKIPPED_BITS = 2**len(SKIPPED) - 1
_MAX_TRIES = 100


@DATASETS.register_module()
class ImageFolder(CustomDataset):
    """Any folder of images: labelled by its sub-folders or unlabelled, nested or flat.

    An image that cannot be used is replaced by another one of the data set, drawn from its index alone, so always the
    same. Which images had which problem is kept for the whole data set, over all workers; each class of problem
    (``PROBLEMS``) is told once, with an example. :class:`mmhdistill.engine.DataReport` tells the totals, over all
    processes.

    Args:
        data_root: the folder.
        with_label: sub-folders are classes.
        stride: take every n-th image of the sorted list, for example for a k-NN bank.
        split: put into each sample, for example ``bank`` or ``query`` for :class:`mmhdistill.evaluation.KNNMetric`.
        max_bad: share of the images, in [0, 1], that may be unusable (rounded up to a number); one more stops the run.
            5 % by default [choice]: rather a failing disk or the wrong folder than some bad files.
        extensions: what the names of images end in; those that ``LoadImage`` reads by default.
        **kwargs: of ``mmpretrain.CustomDataset``.

    Raises:
        FileNotFoundError: there is no image.
        RuntimeError: while samples are read, more than ``max_bad`` of the images are unusable.
    """

    def __init__(self, data_root: str, with_label: bool = False, stride: int = 1, split: str | None = None,
                 max_bad: float = 0.05, extensions: tuple[str, ...] = EXTENSIONS, **kwargs):
        if not 0 <= max_bad <= 1:
            raise ValueError(f'max_bad={max_bad}: give the share of images that may be unusable, in [0, 1].')
        self.stride = stride
        self.split = split
        self.max_bad = max_bad
        # What a listing could not reach: (class, path, what the system says).
        self.not_listed: list[tuple[str, str, str]] = []
        self.beside = 0  # images beside the classes
        super().__init__(data_root=data_root, with_label=with_label, extensions=extensions, **kwargs)

    def full_init(self) -> None:
        if self._fully_initialized:
            return
        super().full_init()
        # Shared with the workers. A bit for each class of problem; the images' own, and those that were told.
        self.marks = torch.zeros(len(self), dtype=torch.int32).share_memory_()
        self._told = torch.zeros(1, dtype=torch.int32).share_memory_()

    def load_data_list(self) -> list[dict]:
        try:
            samples = super().load_data_list()[::self.stride]
        except (OSError, RuntimeError) as error:
            raise self._nothing_found() from error
        if not samples:
            raise self._nothing_found()
        if self.split is not None:
            for sample in samples:
                sample['split'] = self.split
        return samples

    def _find_samples(self) -> list:
        if not isinstance(get_file_backend(self.img_prefix, enable_singleton=True), LocalBackend):
            return super()._find_samples()
        if self.with_label:
            classes = list_folders(self.img_prefix)
            if self.CLASSES is not None and len(self.CLASSES) != len(classes):
                raise ValueError(f"'{self.img_prefix}' has {len(classes)} sub-folders, and metainfo names "
                                 f'{len(self.CLASSES)} classes: give one name for each, in alphabetical order.')
            self.folder_to_idx = {name: label for label, name in enumerate(classes)}
            if self.CLASSES is None:
                self._metainfo['classes'] = tuple(classes)
            # Listed as a whole, so that a class that links back to the folder is a loop. Files beside the classes have
            # no label.
            members = {name: [] for name in classes}
            paths = self._list()
            self.beside = sum(os.sep not in path for path in paths)
            for path in paths:
                members.get(path.partition(os.sep)[0], []).append(path)
            samples = [(path, label) for name, label in self.folder_to_idx.items() for path in members[name]]
            empty = [name for name in classes if not members[name]]
            if samples and empty:
                MMLogger.get_current_instance().warning(
                    f'classes without an image: {", ".join(map(printable, empty))}')
        else:
            samples = self._list()
        for problem in dict.fromkeys(problem for problem, _, _ in self.not_listed):
            found = [entry[1:] for entry in self.not_listed if entry[0] == problem]
            MMLogger.get_current_instance().warning(
                f'not listed, {problem}: {len(found)} paths, for example {printable(found[0][0])} ({found[0][1]})')
        return samples

    def _list(self) -> list[str]:
        names, self.not_listed = list_images(self.img_prefix, self.extensions)
        return names

    def _nothing_found(self) -> FileNotFoundError:
        where = 'sub-folders (one per class) of ' if self.with_label else ''
        cure = 'Set data_root to the folder that holds them.'
        if self.beside:
            cure = (f'{self.beside} lie in the folder itself: with_label=False of the data set takes them, without '
                    'labels.')
        return FileNotFoundError(f"no image found in {where}'{self.img_prefix}': expected files ending in "
                                 f'{", ".join(sorted(self.extensions))}. {cure}')

    def prepare_data(self, idx: int) -> dict:
        if not -len(self) <= idx < len(self):
            raise IndexError(f'index {idx} is out of range for {len(self)} images.')
        for index in self._candidates(idx % len(self)):
            info = self.get_data_info(index)
            info['conversions'] = conversions = []
            try:
                sample = self.pipeline(info)
            except Exception as error:
                error = error if isinstance(error, BadImage) else _fault(info['img_path'])
                if error is None:
                    raise  # The image is fine: the fault lies in the pipeline.
                if self._mark(index, {error.problem: str(error)}):
                    self._check_limit()
            else:
                self._mark(index, {problem: f'{problem}: {CONVERTED[problem]}' for problem in conversions})
                return sample
        raise RuntimeError(f"{_MAX_TRIES} images in a row of '{printable(self.img_prefix)}' cannot be decoded: check "
                           f'the folder, {self._check_command()}')

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        # Neighbours may share its fate, so the next is none of them, and drawn apart from the training's randomness.
        others = random.Random(index)
        for _ in range(_MAX_TRIES - 1):
            yield others.randrange(len(self))

    def _mark(self, index: int, details: dict[str, str]) -> bool:
        """Whether a class of problem is new to the image."""
        bits, marked = sum(1 << PROBLEMS.index(problem) for problem in details), int(self.marks[index])
        if not bits & ~marked:
            return False
        self.marks[index] = marked | bits  # at once: two workers may have drawn the same image
        for problem, detail in details.items():
            self._tell(index, problem, detail)
        return True

    def _tell(self, index: int, problem: str, detail: str) -> None:
        bit, told = 1 << PROBLEMS.index(problem), int(self._told)
        if told & bit:
            return
        self._told.fill_(told | bit)
        path, logger = printable(self.get_data_info(index)['img_path']), MMLogger.get_current_instance()
        if problem in SKIPPED:
            logger.warning(f'{path} cannot be used ({detail}); another image stands in for it, as for each that is '
                           f'{problem}')
        else:
            logger.info(f'images are converted ({detail}), for example {path}')

    def merge_marks(self, marks: torch.Tensor) -> None:
        """Add what other processes found, (len(self), ) like ``marks``; tell what is new, and check the limit."""
        # Only where there is something new: workers are writing, too.
        for index in (marks & ~self.marks).nonzero().flatten().tolist():
            self.marks[index] |= marks[index]
        for problem, (_, index) in self.problems().items():
            self._tell(index, problem, f'{problem}: {CONVERTED.get(problem, "found by another process")}')
        self._check_limit()

    def problems(self) -> dict[str, tuple[int, int]]:
        """Class of problem -> number of images so far, and the first one's index; of ``PROBLEMS``, in that order."""
        found = {}
        for position, problem in enumerate(PROBLEMS):
            indices = (self.marks & 1 << position).nonzero()
            if len(indices):
                found[problem] = len(indices), int(indices[0])
        return found

    def num_bad(self) -> int:
        """Images so far that cannot be used."""
        return int((self.marks & _SKIPPED_BITS).count_nonzero())

    def _check_limit(self) -> None:
        bad, limit = self.num_bad(), math.ceil(self.max_bad * len(self))
        if bad <= limit:
            return
        kinds = {problem: found for problem, found in self.problems().items() if problem in SKIPPED}
        counts = ', '.join(f'{number} {problem}' for problem, (number, _) in kinds.items())
        example = self.get_data_info(next(iter(kinds.values()))[1])['img_path']
        raise RuntimeError(
            f"{bad} of the {len(self)} images of '{printable(self.img_prefix)}' cannot be used ({counts}; for example "
            f'{printable(example)}), more than max_bad={self.max_bad:g} allows, {limit}: list them all, '
            f'{self._check_command()}, and repair or remove them, or raise max_bad of the data set.')

    def _check_command(self) -> str:
        return f"python -m mmhdistill.datasets.check '{printable(self.img_prefix)}'"


def _fault(path: str) -> BadImage | None:
    """What is wrong with an image on which a pipeline failed that loads it in another way; None if nothing is."""
    try:
        read_image(path)
    except BadImage as error:
        return error
    return None
