"""Image files as they are found: decoded, converted where that is harmless, refused by a named class of problem."""
import io
import re
from collections.abc import Callable

import cv2
import numpy as np
from mmengine import fileio
from PIL import Image, UnidentifiedImageError

# Classes of problem. An image with one of the first is skipped; the others are converted, to what is said.
SKIPPED = ('unreadable', 'symlink loop', 'empty', 'not an image', 'truncated', 'damaged', 'hostile size')
CONVERTED = {
    'greyscale': 'copied to three channels',
    'CMYK': 'turned into RGB',
    'colour mode': 'of a palette or another colour space, turned into RGB',
    'alpha': 'laid on white',
    '16-bit': 'scaled to 8 bits',
    'EXIF rotation': 'turned upright',
    'animated': 'of which the first frame is taken',
}

# [choice] A side below this holds no content; ResizeEdge makes a strip of 1000:1 fill gigabytes; Pillow's own limit of
# pixels, 256 MB as RGB.
MIN_SIDE = 8
MAX_ASPECT = 50
MAX_PIXELS = 89_478_485

# [choice] What Pillow may open: some of its other formats start programs.
_FORMATS = ('JPEG', 'PNG', 'BMP', 'PPM', 'TIFF', 'GIF', 'WEBP')
_SIGNATURES = (b'\xff\xd8\xff', b'\x89PNG', b'GIF8', b'RIFF', b'II*\0', b'MM\0*')
# In the coded data of a JPEG's scan: any marker but a restart.
_MARKER = re.compile(rb'\xff[^\x00\xff\xd0-\xd7]', re.S)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """An image that cannot be used.

    Attributes:
        problem: its class, one of ``SKIPPED``.
    """

    def __init__(self, problem: str, detail: str):
        super().__init__(f'{problem}: {detail}')
        self.problem = problem


def read_image(path: str, backend_args: dict | None = None) -> tuple[np.ndarray, list[str]]:
    """:func:`decode` of a file, or of an address of one of mmengine's file backends."""
    try:
        content = fileio.get(path, backend_args=backend_args)
    except OSError as error:
        raise BadImage('unreadable', str(error)) from error
    return decode(content)


def decode(content: bytes) -> tuple[np.ndarray, list[str]]:
    """Pixels (H, W, 3) in BGR, uint8, upright, and the names (keys of ``CONVERTED``) of what had to be converted.

    A JPEG whose single scan reaches its end is decoded by OpenCV, which gives the pixels of mmcv's
    ``LoadImageFromFile``; anything else by Pillow, which tells what is wrong.

    Raises:
        BadImage: ``content`` is empty, no image, not whole, damaged, or of a hostile size: a side below 8 px, one side
            over 50 times the other, or more than 89 million pixels [choice]. The size is read before memory is taken.
    """
    if not content:
        raise BadImage('empty', 'the file has no bytes')
    header = _single_scan_jpeg(content)
    if header is not None:
        return _by_opencv(content, *header)
    try:
        return _by_pillow(content)
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage('hostile size', str(error)) from error
    except UnidentifiedImageError as error:
        if content.startswith(_SIGNATURES):
            raise BadImage('damaged', 'its header is broken') from error
        raise BadImage('not an image', 'its content is of no known image format') from error
    except Exception as error:  # Decoders raise anything.
        problem = 'truncated' if isinstance(error, EOFError) or 'truncated' in str(error).lower() else 'damaged'
        raise BadImage(problem, str(error) or type(error).__name__) from error


def check_size(width: int, height: int) -> None:
    """Raise BadImage for the sizes that :func:`decode` refuses."""
    short, long = sorted((width, height))
    if short < MIN_SIDE:
        raise BadImage('hostile size', f'{width}x{height} px, a side below {MIN_SIDE}')
    if long > MAX_ASPECT * short:
        raise BadImage('hostile size', f'{width}x{height} px, one side over {MAX_ASPECT} times the other')
    if width * height > MAX_PIXELS:
        raise BadImage('hostile size', f'{width}x{height} px, over {MAX_PIXELS:,} pixels')


def _single_scan_jpeg(content: bytes) -> tuple[int, int, int, bytes] | None:
    """Width, height, channels and EXIF of a sequential 8-bit JPEG with one scan and its end; else None."""
    if not content.startswith(b'\xff\xd8'):
        return None
    position, frame, exif = 2, None, b''
    while content[position:position + 1] == b'\xff':
        marker = content[position + 1:position + 2]
        if marker == b'\xff':  # padding
            position += 1
            continue
        length = int.from_bytes(content[position + 2:position + 4], 'big')
        body = content[position + 4:position + 2 + length]
        if length < 2 or len(body) != length - 2:
            return None
        position += 2 + length
        if marker in (b'\xc0', b'\xc1') and len(body) > 5 and body[0] == 8:
            frame = int.from_bytes(body[3:5], 'big'), int.from_bytes(body[1:3], 'big'), body[5]
        elif marker == b'\xe1' and body.startswith(b'Exif\0\0'):
            exif = exif or body
        elif marker == b'\xda':
            end = _MARKER.search(content, position)
            return (*frame, exif) if frame and end and end[0] == b'\xff\xd9' else None
    return None


def _by_opencv(content: bytes, width: int, height: int, channels: int, exif: bytes) -> tuple[np.ndarray, list[str]]:
    check_size(width, height)
    try:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise BadImage('damaged', str(error)) from error
    if pixels is None:
        raise BadImage('damaged', 'a JPEG that OpenCV cannot decode')
    found = {1: ['greyscale'], 4: ['CMYK']}.get(channels, [])
    if exif and _orientation(lambda: _parse(exif)) in _UPRIGHT:
        found = [*found, 'EXIF rotation']
    return pixels, found


def _parse(exif: bytes) -> Image.Exif:
    tags = Image.Exif()
    tags.load(exif)
    return tags


def _orientation(read: Callable[[], Image.Exif]) -> int:
    """1 where EXIF is broken: of a good image it is no loss."""
    try:
        return read().get(0x0112, 1)
    except Exception:  # Any bytes may stand there.
        return 1


def _by_pillow(content: bytes) -> tuple[np.ndarray, list[str]]:
    image = Image.open(io.BytesIO(content), formats=_FORMATS)
    check_size(*image.size)
    image.verify()  # checksums, after which the file has to be opened again
    image = Image.open(io.BytesIO(content), formats=_FORMATS)
    deep = _is_deep(image)
    image.load()
    found = ['animated'] if getattr(image, 'is_animated', False) else []
    orientation = _orientation(image.getexif)
    if deep and image.mode[0] == 'I':
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode[0] in 'IF':
        raise BadImage('not an image', f'its {image.format} pixels of mode {image.mode} have no known range')
    if deep:
        found.append('16-bit')
    if orientation in _UPRIGHT:
        found.append('EXIF rotation')
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode in ('1', 'L', 'LA', 'La'):
        found.append('greyscale')
    elif image.mode == 'CMYK':
        found.append('CMYK')
    elif image.mode not in ('RGB', 'RGBA', 'RGBa', 'RGBX'):
        found.append('colour mode')
    if image.has_transparency_data:
        found.append('alpha')
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return np.ascontiguousarray(np.asarray(image.convert('RGB'))[..., ::-1]), found


def _is_deep(image: Image.Image) -> bool:
    """16 bits a channel, told by how Pillow is going to read: of RGB it keeps the upper eight."""
    reader = image.tile[0].args if image.tile else ()
    if image.format == 'PPM' and isinstance(reader, tuple):
        return reader[-1] > 255
    return ';16' in str(reader) and ';16S' not in str(reader)  # signed ones have no known range
