"""The teacher cards as a table, and a teacher's file put to the test."""
import time
from dataclasses import fields

import mmcv
import torch

from ..models import CARDS, TeacherCard, ViTTeacher
from ..models.losses.token_relation_loss import default_layer_pairs
from .models import precision_error

_HEADER = ('card', 'width x depth, heads', 'patch', 'image', 'extra tokens', 'normalisation', 'positions', 'format',
           'hash', 'licence')
_NORMALISATION = {(123.675, 116.28, 103.53): 'ImageNet', (122.7709383, 116.7460125, 104.09373615): 'CLIP',
                  (127.5, 127.5, 127.5): '0.5'}


def card_rows() -> list[tuple[str, ...]]:
    """The table of all cards, header first."""
    return [_HEADER] + [_row(card) for card in CARDS.values()]


def _row(card: TeacherCard) -> tuple[str, ...]:
    registers = f' + {card.registers}' if card.registers else ''
    hashes = [f'{kind} {value[:8]}' for kind, value in (('sha256', card.sha256), ('md5', card.md5)) if value]
    return (card.name, f'{card.embed_dims} x {card.depth}, {card.num_heads}', str(card.patch_size), str(card.img_size),
            f'class{registers}' if card.class_token else 'none', _NORMALISATION[card.mean], card.resampling,
            card.format, ', '.join(hashes) or 'none published', card.licence)


def as_text(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def as_markdown(rows: list[tuple[str, ...]]) -> str:
    lines = [f'| {" | ".join(row)} |' for row in rows]
    return '\n'.join([lines[0], f'|{"---|" * len(rows[0])}', *lines[1:]])


def show(card: TeacherCard) -> str:
    """Every field of a card."""
    width = max(len(field.name) for field in fields(card))
    return '\n'.join(f'{field.name:<{width}}  {getattr(card, field.name)}' for field in fields(card))


def check(card: TeacherCard, checkpoint: str, image: str | None, **source: str | None) -> str:
    """Load a teacher's file strictly and run it once on a photograph; the receipt and what came out.

    Args:
        checkpoint: path, URL or ``'auto'``.
        image: path of a photograph; scikit-image's astronaut if None.
        source: ``sha256``, ``entry`` and ``prefix`` of :class:`ViTTeacher`.
    """
    teacher = ViTTeacher(card, checkpoint=checkpoint, name=card.name, input_mean=[0.0] * 3, input_std=[1.0] * 3,
                         **source)
    receipt = teacher.load()
    last = teacher.spec.depth - 1
    taps = {last: frozenset({'features'})}
    receipt.run = teacher.describe_run(card.grid, taps)
    pixels = torch.from_numpy(_photograph(image)).permute(2, 0, 1)[None].float()
    start = time.perf_counter()
    output = teacher(pixels, card.grid, taps)
    seconds = time.perf_counter() - start
    patches = output.patches(last, 'features')[0]
    if not torch.isfinite(patches).all():
        raise ValueError(f'{receipt.source} gives features that are not finite: its weights are damaged.')
    unit = patches / patches.norm(dim=-1, keepdim=True)
    alike = (unit @ unit.T).mean()
    layers = [layer for _, layer in default_layer_pairs(teacher.spec.depth, teacher.spec.depth)]
    error = precision_error(teacher, pixels, card.grid, layers)
    return (f'{receipt}\n  bfloat16 features differ by {error["features"]:.2%} from those in float32, relations of '
            f'layers {min(layers)} to {max(layers)} by a KL of {error["relations"]:.1e}\n'
            f'  forward  {len(patches)} patch tokens of width {patches.shape[1]} in {seconds:.2f} s, mean '
            f'norm {patches.norm(dim=-1).mean():.2f}, mean cosine among them {alike:.2f}')


def _photograph(image: str | None):
    """(H, W, 3), RGB in 0-255."""
    if image is None:
        try:
            from skimage import data
        except ImportError as error:
            raise ImportError('no --image is given, and scikit-image, which carries one, is not installed: give an '
                              "image file, or run: pip install 'mmhdistill[quickstart]'") from error
        return data.astronaut()
    # Asked for RGB, mmcv fails on a file that is no image.
    pixels = mmcv.imread(image)
    if pixels is None:
        raise ValueError(f'{image} is no image file that can be read: give a JPEG or PNG.')
    return pixels[..., ::-1].copy()
