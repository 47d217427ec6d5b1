import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from PIL import Image

from mmhdistill.datasets import LoadImage
from mmhdistill.datasets.decode import CONVERTED, MAX_PIXELS, SKIPPED, BadImage, check_size, decode, read_image
from mmhdistill.registry import TRANSFORMS
from tests.datasets.image_files import bad_files, convertible, deep_png, encoded, picture, png, rotated

BAD = bad_files(each=15)


def bgr(image):
    return np.asarray(image)[..., ::-1]


def problem_of(content):
    with pytest.raises(BadImage) as caught:
        decode(content)
    assert str(caught.value).startswith(f'{caught.value.problem}: ')
    return caught.value.problem


JPEGS = {
    'baseline': dict(),
    'best': dict(quality=100, subsampling=0),
    'worst': dict(quality=5, subsampling=2),
    'progressive': dict(progressive=True),
    'restarts': dict(restart_marker_blocks=2),
    'comment': dict(comment=b'\xff\xd9 in a comment \xff\xda'),
    'thumbnail': dict(icc_profile=encoded(picture(9), 'JPEG')),
    **{f'turned {orientation}': dict(exif=rotated(orientation)) for orientation in range(1, 9)},
}


# Of a progressive CMYK, Pillow makes RGB by other roundings than OpenCV.
@pytest.mark.parametrize('name, mode', [(name, mode) for name in JPEGS for mode in ('RGB', 'L', 'CMYK')
                                        if (name, mode) != ('progressive', 'CMYK')])
def test_decode__good_jpeg_has_the_pixels_of_mmcv(name, mode, tmp_path):
    path = tmp_path / 'image.jpg'
    path.write_bytes(encoded(picture(0, (61, 45)).convert(mode), 'JPEG', **JPEGS[name]))
    want = LoadImageFromFile().transform(dict(img_path=str(path)))
    got = LoadImage().transform(dict(img_path=str(path)))
    assert list(got) == list(want) == ['img_path', 'img', 'img_shape', 'ori_shape']
    assert got['img'].dtype == np.uint8 and np.array_equal(got['img'], want['img'])
    assert got['img_shape'] == want['img_shape'] == got['ori_shape'] == want['ori_shape'] == got['img'].shape[:2]


@pytest.mark.parametrize('kind', ['PNG', 'BMP', 'PPM', 'TIFF', 'GIF', 'WEBP'])
def test_decode__other_formats(kind):
    image = picture(0) if kind != 'GIF' else picture(0).quantize(64)
    pixels, conversions = decode(encoded(image, kind, **(dict(lossless=True) if kind == 'WEBP' else {})))
    assert np.array_equal(pixels, bgr(image.convert('RGB')))
    assert pixels.flags['C_CONTIGUOUS'] and pixels.dtype == np.uint8
    assert conversions == (['colour mode'] if kind == 'GIF' else [])


@pytest.mark.parametrize('name', convertible())
def test_decode__names_what_was_converted(name):
    content, conversions = convertible()[name]
    pixels, found = decode(content)
    assert sorted(found) == sorted(conversions)
    assert pixels.ndim == 3 and pixels.shape[2] == 3
    assert set(found) <= set(CONVERTED)


def test_decode__greyscale_is_three_equal_channels():
    grey = picture(0).convert('L')
    for kind in ('PNG', 'JPEG'):
        pixels = decode(encoded(grey, kind, **(dict(quality=100) if kind == 'JPEG' else {})))[0]
        assert np.abs(pixels.astype(int) - np.asarray(grey)[..., None]).max() <= (kind == 'JPEG')


@pytest.mark.parametrize('kind', ['JPEG', 'TIFF'])
def test_decode__cmyk(kind):
    image = picture(0)
    pixels, _ = decode(encoded(image.convert('CMYK'), kind, **(dict(quality=100) if kind == 'JPEG' else {})))
    assert np.abs(pixels.astype(int) - bgr(image)).max() <= (8 if kind == 'JPEG' else 1)


def test_decode__alpha_is_laid_on_white():
    pixels = np.zeros((10, 30, 4), np.uint8)
    pixels[..., 0] = 100
    pixels[:, 10:20, 3], pixels[:, 20:, 3] = 51, 255  # a fifth, and all
    found, _ = decode(encoded(Image.fromarray(pixels), 'PNG'))
    assert np.unique(found[:, :10]).tolist() == [255]
    # 0.2 x (0, 0, 100) + 0.8 x 255
    assert found[0, 10:20].tolist() == [[204, 204, 224]] * 10
    assert found[0, 20:].tolist() == [[0, 0, 100]] * 10


def test_decode__transparent_colour_of_a_palette_is_white():
    image = Image.new('P', (20, 20))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.paste(1, (0, 0, 10, 20))
    pixels, conversions = decode(encoded(image, 'PNG', transparency=0))
    assert conversions == ['colour mode', 'alpha']
    assert pixels[0, 0].tolist() == [60, 50, 40] and pixels[0, 15].tolist() == [255, 255, 255]


@pytest.mark.parametrize('channels', [1, 3])
def test_decode__16_bit_keeps_the_upper_eight(channels):
    content, deep = deep_png(0, channels)
    pixels, conversions = decode(content)
    assert np.array_equal(pixels, np.broadcast_to((deep >> 8)[..., ::-1], (16, 16, 3)))
    assert '16-bit' in conversions


@pytest.mark.parametrize('header, dtype, conversions', [(b'P5', '>u2', ['16-bit', 'greyscale']),
                                                        (b'P6', '>u2', ['16-bit'])])
def test_decode__16_bit_ppm(header, dtype, conversions):
    channels = 1 if header == b'P5' else 3
    deep = np.random.default_rng(0).integers(0, 2**16, (9, 10, channels)).astype(dtype)
    pixels, found = decode(header + b'\n10 9\n65535\n' + deep.tobytes())
    assert found == conversions
    assert np.abs(pixels[..., ::-1].astype(int) - deep / 257).max() <= 1
    assert decode(header + b'\n10 9\n255\n' + bytes(90 * channels))[1] == conversions[1:]


@pytest.mark.parametrize('mode, dtype', [('F', np.float32), ('I', np.int32)])
def test_decode__pixels_of_unknown_range(mode, dtype):
    with pytest.raises(BadImage, match=f'not an image: its TIFF pixels of mode {mode} have no known range'):
        decode(encoded(Image.fromarray(np.ones((9, 9), dtype)), 'TIFF'))


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_decode__exif_rotation(kind, orientation):
    """What is upright is stored as a camera would that was held so."""
    upright = np.zeros((24, 40), np.uint8)
    upright[:8, :8] = 255  # a corner
    upright[:8, 16:] = 128
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
              6: np.rot90(upright), 7: np.rot90(upright, 2).T, 8: np.rot90(upright, -1)}[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored)).convert('RGB')
    pixels, conversions = decode(encoded(image, kind, exif=rotated(orientation)))
    assert pixels.shape == (24, 40, 3)
    assert np.abs(pixels.astype(int) - upright[..., None]).max() <= 2
    assert conversions == ['EXIF rotation'] * (orientation > 1)


def test_decode__broken_exif_is_no_loss():
    whole = encoded(picture(0), 'JPEG', exif=rotated(6))
    position = whole.index(b'Exif\0\0') + 6
    broken = whole[:position] + b'\xff' * 8 + whole[position + 8:]
    pixels, conversions = decode(broken)
    assert conversions == []
    assert np.array_equal(pixels, decode(encoded(picture(0), 'JPEG'))[0])


def test_decode__first_frame():
    frames = [Image.new('RGB', (20, 10), colour) for colour in ('red', 'lime')]
    for kind, conversions in (('GIF', ['animated', 'colour mode']), ('PNG', ['animated']), ('TIFF', ['animated'])):
        pixels, found = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert np.array_equal(pixels, bgr(frames[0]))
        assert set(found) >= {'animated'} and set(found) <= set(conversions)


@pytest.mark.parametrize('name', BAD)
def test_decode__bad_file(name):
    content, problem = BAD[name]
    assert problem_of(content) == problem


def test_bad_files__are_of_every_class_that_content_has():
    assert {problem for _, problem in BAD.values()} == set(SKIPPED) - {'unreadable', 'symlink loop'}


@pytest.mark.parametrize('progressive', [False, True])
def test_decode__jpeg_cut_anywhere(progressive):
    content = encoded(picture(0), 'JPEG', progressive=progressive)
    scan = content.index(b'\xff\xda')
    assert decode(content)[1] == []
    for stop in range(1, len(content), 37):
        problem = problem_of(content[:stop])
        assert problem in (('truncated', ) if stop > scan + 20 else ('truncated', 'damaged', 'not an image'))
    # Only the end marker is lacking.
    assert problem_of(content[:-2]) == 'truncated'


def test_decode__bytes_behind_the_end_are_no_fault():
    for kind in ('JPEG', 'PNG', 'BMP'):
        content = encoded(picture(0), kind)
        assert np.array_equal(decode(content + b'appended \xff\xd9')[0], decode(content)[0])


def test_decode__scan_that_breaks_off_at_a_false_marker():
    content = encoded(picture(0), 'JPEG', quality=95)
    middle = content.index(b'\xff\xda') + 100
    # A decoder takes what is left for another table, and fills up with grey.
    assert problem_of(content[:middle] + b'\xff\xdb' + content[middle:]) in ('damaged', 'truncated')


@pytest.mark.parametrize('width, height, good', [
    (8, 8, True), (7, 8, False), (8, 7, False), (8, 400, True), (400, 8, True), (8, 401, False), (401, 8, False),
    (1, 1, False), (0, 0, False), (20000, 20, False), (9000, MAX_PIXELS // 9000, True),
    (9000, MAX_PIXELS // 9000 + 1, False)])
def test_check_size(width, height, good):
    if good:
        check_size(width, height)
        return
    with pytest.raises(BadImage, match=f'hostile size: {width}x{height} px, '):
        check_size(width, height)


def test_decode__claimed_size_takes_no_memory():
    import tracemalloc
    tracemalloc.start()
    assert problem_of(png(60000, 60000, bytes(1000))) == 'hostile size'
    assert problem_of(png(9500, 9500, bytes(1000))) == 'hostile size'  # between Pillow's warning and its error
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize('path', ['missing.jpg', '', 'folder'])
def test_read_image__unreadable(path, tmp_path):
    (tmp_path / 'folder').mkdir()
    with pytest.raises(BadImage, match='unreadable: .*Errno') as caught:
        read_image(str(tmp_path / path))
    assert caught.value.problem == 'unreadable'


def test_load_image__is_registered_and_appends_conversions(tmp_path):
    (tmp_path / 'grey.png').write_bytes(encoded(picture(0).convert('L'), 'PNG'))
    transform = TRANSFORMS.build(dict(type='mmhdistill.LoadImage'))
    results = transform(dict(img_path=str(tmp_path / 'grey.png'), conversions=['before']))
    assert results['conversions'] == ['before', 'greyscale']
    assert repr(transform) == 'LoadImage(backend_args=None)'
