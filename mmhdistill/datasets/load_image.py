from mmcv.transforms import BaseTransform

from ..registry import TRANSFORMS
from .decode import read_image


@TRANSFORMS.register_module()
class LoadImage(BaseTransform):
    """Loads an image whatever it is, in place of mmcv's ``LoadImageFromFile``, with the same pixels for a good JPEG.

    Reads ``img_path``; sets ``img`` (H, W, 3) in BGR, uint8, ``img_shape`` and ``ori_shape`` (H, W). Greyscale, CMYK,
    transparent, 16-bit, rotated and animated images are converted; the names of what was converted are appended to the
    list ``conversions`` where there is one, as :class:`mmhdistill.datasets.ImageFolder` puts there.

    Args:
        backend_args: of ``mmengine.fileio``, for files that are not on a disk.

    Raises:
        BadImage: the file cannot be read, or holds no whole image of a sensible size.
    """

    def __init__(self, backend_args: dict | None = None):
        self.backend_args = backend_args

    def transform(self, results: dict) -> dict:
        results['img'], conversions = read_image(results['img_path'], self.backend_args)
        results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
        if 'conversions' in results:
            results['conversions'] += conversions
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(backend_args={self.backend_args})'
