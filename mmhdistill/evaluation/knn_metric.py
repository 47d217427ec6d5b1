import tempfile
from pathlib import Path

import torch
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, get_world_size, is_main_process
from mmengine.evaluator import BaseMetric

from ..functional import knn_accuracy
from ..registry import METRICS


@METRICS.register_module()
class KNNMetric(BaseMetric):
    """Weighted k-NN top-1 accuracy of frozen features, in percent (k = 20, temperature 0.07).

    The data loader runs over bank and query images in one pass, told apart by ``split`` in their samples: a
    ``ConcatDataset`` of two :class:`mmhdistill.datasets.ImageFolder`. Reports ``knn/patch`` (mean patch token after the
    final norm), for models with a class token ``knn/cls``, and ``knn/<teacher>`` of features of teachers. Neighbours
    are searched by the main process, on its GPU where there is one: the others wait for it.

    Args:
        collect_dir: where processes leave their features for it, in a folder made and removed for that: on a disk that
            all of them share; ``.dist_test`` of the current folder by default.
    """

    def __init__(self, k: int = 20, temperature: float = 0.07, collect_device: str = 'cpu', prefix: str | None = 'knn',
                 collect_dir: str | None = None):
        super().__init__(collect_device=collect_device, prefix=prefix, collect_dir=collect_dir)
        self.folder = collect_dir
        self.k = k
        self.temperature = temperature

    def process(self, data_batch, data_samples: list[dict]) -> None:
        for sample in data_samples:
            if sample.get('split') not in ('bank', 'query'):
                raise ValueError(f"KNNMetric needs samples of split 'bank' or 'query', got {sample.get('split')!r}: "
                                 "set split in both ImageFolders and pack it, PackInputs(meta_keys=('split', ...)).")
            if 'feature' not in sample:
                raise ValueError('KNNMetric needs a model that gives features, as a distiller does: test with the '
                                 "config of a distiller whose student has this model's architecture.")
            features = {'patch': sample['feature'], 'cls': sample.get('cls_feature'),
                        **sample.get('teacher_features', {})}
            self.results.append(
                dict(
                    is_bank=sample['split'] == 'bank',
                    label=int(sample['gt_label']),
                    # A view would keep the whole batch alive.
                    features={name: x.float().cpu().clone() for name, x in features.items() if x is not None}))

    def evaluate(self, size: int) -> dict[str, float]:
        if self.folder is not None and get_world_size() > 1:
            # Not the folder itself: mmengine removes what it is given.
            made = [None]
            if is_main_process():
                Path(self.folder).mkdir(parents=True, exist_ok=True)
                made = [tempfile.mkdtemp(dir=Path(self.folder).absolute())]
            broadcast_object_list(made)
            self.collect_dir = made[0]
        return super().evaluate(size)

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        is_bank = torch.tensor([r['is_bank'] for r in results])
        if is_bank.all() or not is_bank.any():
            raise ValueError(f"KNNMetric needs bank and query images, got {int(is_bank.sum())} of split 'bank' and "
                             f"{int((~is_bank).sum())} of split 'query'.")
        labels = torch.tensor([r['label'] for r in results])
        device, metrics = get_device(), {}
        for name in results[0]['features']:
            x = torch.stack([r['features'][name] for r in results])
            parts = (part[chosen].to(device) for chosen in (is_bank, ~is_bank) for part in (x, labels))
            metrics[name] = knn_accuracy(*parts, k=self.k, temperature=self.temperature)
        return metrics
