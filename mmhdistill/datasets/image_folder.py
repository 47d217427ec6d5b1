import mmcv
import torch
from mmengine.logging import MMLogger
from mmpretrain.datasets import CustomDataset

from ..registry import DATASETS

_MAX_SKIPS = 100


@DATASETS.register_module()
class ImageFolder(CustomDataset):
    """Any folder of images: labelled by its sub-folders or unlabelled, nested or flat.

    An image that cannot be decoded is replaced by the next one that can; the first is named in a warning, and then
    every tenfold number is reported, over all workers.

    Args:
        data_root: the folder.
        with_label: sub-folders are classes.
        stride: take every n-th image of the sorted list, for example for a k-NN bank.
        split: put into each sample, for example ``bank`` or ``query`` for :class:`mmhdistill.evaluation.KNNMetric`.
        **kwargs: of ``mmpretrain.CustomDataset``.
    """

    def __init__(self, data_root: str, with_label: bool = False, stride: int = 1, split: str | None = None,
                 **kwargs):
        self.stride = stride
        self.split = split
        # Shared with the workers, so that the count is the whole data set's.
        self._num_skipped = torch.zeros(1, dtype=torch.int64).share_memory_()
        super().__init__(data_root=data_root, with_label=with_label, **kwargs)

    def load_data_list(self) -> list[dict]:
        try:
            samples = super().load_data_list()[::self.stride]
        except (FileNotFoundError, RuntimeError) as error:
            raise self._nothing_found() from error
        if not samples:
            raise self._nothing_found()
        if self.split is not None:
            for sample in samples:
                sample['split'] = self.split
        return samples

    def _nothing_found(self) -> FileNotFoundError:
        where = 'sub-folders (one per class) of ' if self.with_label else ''
        return FileNotFoundError(f"no image found in {where}'{self.img_prefix}': expected files ending in "
                                 f'{", ".join(sorted(self.extensions))}. Set data_root to the folder that holds them.')

    def prepare_data(self, idx: int) -> dict:
        if not -len(self) <= idx < len(self):
            raise IndexError(f'index {idx} is out of range for {len(self)} images.')
        for offset in range(_MAX_SKIPS):
            index = (idx + offset) % len(self)
            try:
                return super().prepare_data(index)
            except Exception:
                path = self.get_data_info(index)['img_path']
                if _decodes(path):
                    raise  # The image is fine: the fault lies in the pipeline.
                self._report_skip(path)
        raise RuntimeError(f"{_MAX_SKIPS} images in a row of '{self.img_prefix}' cannot be decoded: check the folder.")

    def _report_skip(self, path: str) -> None:
        self._num_skipped += 1
        count = int(self._num_skipped)
        if count == 10**(len(str(count)) - 1):
            MMLogger.get_current_instance().warning(
                f'images that cannot be decoded so far: {count}, for example {path}; the next good one is used instead')


def _decodes(path: str) -> bool:
    try:
        return mmcv.imread(path) is not None
    except Exception:
        return False
