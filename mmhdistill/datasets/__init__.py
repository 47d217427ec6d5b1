from .decode import BadImage
from .image_folder import ImageFolder
from .load_image import LoadImage

__all__ = ['BadImage', 'ImageFolder', 'LoadImage']
