"""Files as folders of images have them: good ones, ones to convert, and a corpus of bad ones, from a fixed seed."""
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

ROTATE = 0x0112


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth RGB picture of (width, height) ``size``, compressible like a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def rotated(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ROTATE] = orientation
    return exif


def deep_png(seed: int, channels: int = 3, size: int = 16) -> tuple[bytes, np.ndarray]:
    """A 16-bit PNG and its pixels (size, size, channels) in RGB."""
    pixels = np.random.default_rng(seed).integers(0, 2**16, (size, size, channels), dtype=np.uint16)
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)
    return png(size, size, rows, depth=16, colour={1: 0, 3: 2}[channels]), pixels


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of raw ``rows``, whatever its header claims."""
    chunks = [(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)),
              (b'IDAT', zlib.compress(rows)), (b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(struct.pack('>I', len(body)) + kind + body
                                           + struct.pack('>I', zlib.crc32(kind + body)) for kind, body in chunks)


def convertible() -> dict[str, tuple[bytes, list[str]]]:
    """File name -> content and what has to be converted."""
    image = picture(1)
    frames = [picture(seed).convert('P') for seed in (2, 3)]
    transparent = image.copy()
    transparent.putalpha(128)
    return {
        'grey.jpg': (encoded(image.convert('L'), 'JPEG'), ['greyscale']),
        'grey.png': (encoded(image.convert('L'), 'PNG'), ['greyscale']),
        'bits.png': (encoded(image.convert('1'), 'PNG'), ['greyscale']),
        'cmyk.jpg': (encoded(image.convert('CMYK'), 'JPEG'), ['CMYK']),
        'cmyk.tif': (encoded(image.convert('CMYK'), 'TIFF'), ['CMYK']),
        'palette.png': (encoded(image.convert('P'), 'PNG'), ['colour mode']),
        'lab.tif': (encoded(Image.fromarray(np.asarray(image), 'RGB').convert('YCbCr'), 'TIFF'), ['colour mode']),
        'rgba.png': (encoded(transparent, 'PNG'), ['alpha']),
        'la.png': (encoded(transparent.convert('LA'), 'PNG'), ['greyscale', 'alpha']),
        'deep.png': (deep_png(4)[0], ['16-bit']),
        'deep-grey.png': (deep_png(5, channels=1)[0], ['16-bit', 'greyscale']),
        'turned.jpg': (encoded(image, 'JPEG', exif=rotated(6)), ['EXIF rotation']),
        'turned.png': (encoded(image, 'PNG', exif=rotated(3)), ['EXIF rotation']),
        'moving.gif': (encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:]), ['animated', 'colour mode']),
        'moving.webp': (encoded(image, 'WEBP', save_all=True, append_images=[picture(2)]), ['animated']),
    }


def bad_files(each: int = 27) -> dict[str, tuple[bytes, str]]:
    """Name -> content and class of problem of eight times ``each`` files, each broken by its format's rules."""
    rng, files = np.random.default_rng(0), {}
    for index in range(each):
        image = picture(index)
        made = [_truncated(image, index, rng), _flipped_png(image, rng), _flipped_jpeg(image, rng),
                _flipped_signature(image, rng), _no_image(index, rng), (b'', 'empty', 'jpg'),
                _hostile_size(image, index, rng), _claimed_size(image, index, rng)]
        for kind, (content, problem, ending) in enumerate(made):
            files[f'{kind}-{index:02}.{ending}'] = content, problem
    return files


def write_corpus(folder: Path, files: dict[str, tuple[bytes, object]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)


def _truncated(image, index, rng):
    kind, ending = [('JPEG', 'jpg'), ('PNG', 'png'), ('BMP', 'bmp'), ('PPM', 'ppm'), ('GIF', 'gif')][index % 5]
    content = encoded(image, kind, **(dict(progressive=bool(index % 2)) if kind == 'JPEG' else {}))
    start = 800 if kind == 'GIF' else 100  # behind the palette, without which there is no header
    if kind == 'JPEG':
        start = content.index(b'\xff\xda') + 20
    return content[:rng.integers(start, len(content) - 2)], 'truncated', ending


def _flip(content: bytes, position: int, rng, bit: int | None = None) -> bytes:
    mask = 1 << (rng.integers(8) if bit is None else bit)
    return content[:position] + bytes([content[position] ^ mask]) + content[position + 1:]


def _flipped_png(image, rng):
    """One bit of the pixels' chunk, which its checksum tells."""
    content = encoded(image, 'PNG')
    start = content.index(b'IDAT') + 4
    return _flip(content, int(rng.integers(start, len(content) - 12)), rng), 'damaged', 'png'


def _flipped_jpeg(image, rng):
    """The highest bit of a count of the first Huffman table, which then holds more codes than its segment."""
    content = encoded(image, 'JPEG')
    table = content.index(b'\xff\xc4') + 5
    return _flip(content, table + int(rng.integers(16)), rng, bit=7), 'damaged', 'jpg'


def _flipped_signature(image, rng):
    return _flip(encoded(image, 'PNG'), int(rng.integers(4)), rng), 'not an image', 'png'


def _no_image(index, rng):
    content = [b'a text, no image\n' * 9, b'<!DOCTYPE html><title>404 Not Found</title>', b'{"error": 403}',
               b'%PDF-1.7\n' + bytes(200), b'PK\x03\x04' + rng.bytes(300), rng.bytes(2000), bytes(500),
               b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n', b'\0'][index % 9]
    return content, 'not an image', ['jpg', 'png', 'JPEG'][index % 3]


def _hostile_size(image, index, rng):
    size = [(1, 1), (20000, 20), (20, 20000), (7, 300), (8, 401)][index % 5]
    kind, ending = [('PNG', 'png'), ('JPEG', 'jpg')][index % 2]
    return encoded(image.resize(size), kind), 'hostile size', ending


def _claimed_size(image, index, rng):
    """A small file whose header claims gigabytes."""
    side = int(rng.integers(20000, 60000))
    if index % 2:
        return png(side, side, bytes(1000)), 'hostile size', 'png'
    content = encoded(image, 'JPEG')
    frame = content.index(b'\xff\xc0') + 5
    return content[:frame] + struct.pack('>HH', side, side) + content[frame + 4:], 'hostile size', 'jpg'
