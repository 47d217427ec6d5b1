import json
from dataclasses import replace

import pytest
import torch

from mmhdistill.models.teachers.receipt import Receipt, dtype_note

BARE = Receipt(name='mae', model='tiny', source='/weights/w.pth', matched=42, total=42,
               mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
RUN = dict(grid=[16, 12], image_size=[224, 168], extra_tokens='1 class + 4 register', positions='as trained',
           deepest_layer=9, depth=12, gflops=17.5649)
FULL = replace(
    BARE, format='timm', prefix='module.backbone.', entry='ema.model', sha256='0badc0de', published=True,
    dtype='float16 in the file, float32 in memory', licence='CC-BY-NC-4.0',
    unused=['head.weight', 'mask_token', 'head.bias', 'decoder.blocks.0.norm.weight', 'optimizer'], run=RUN)


def test_str__bare():
    assert str(BARE) == """\
teacher 'mae': tiny
  file     /weights/w.pth
  tensors  42/42, float32; left aside: nothing
  images   RGB mean 123.67 116.28 103.53, std 58.40 57.12 57.38 in 0-255"""


def test_str__everything():
    assert str(FULL) == """\
teacher 'mae': tiny (licence CC-BY-NC-4.0)
  file     /weights/w.pth
  sha256   0badc0de, as expected
  tensors  42/42, timm format under 'module.backbone.' in entry 'ema.model', float16 in the file, float32 in memory; \
left aside: head.* (2), mask_token, decoder.blocks.0.norm.weight, optimizer
  images   RGB mean 123.67 116.28 103.53, std 58.40 57.12 57.38 in 0-255
  tokens   224x168 px, 16x12 patches; extra tokens: 1 class + 4 register; positions as trained
  runs     layers 0 to 9 of 12, 17.6 GFLOPs an image"""


@pytest.mark.parametrize('change, line', [
    (dict(published=None), '  sha256   0badc0de, not pinned: compare it with a source that you trust'),
    (dict(published=False), '  sha256   0badc0de, another file than the published one'),
    (dict(prefix='', entry=''), '  tensors  42/42, timm format, float16 in the file, float32 in memory; left aside: '
     'head.* (2), mask_token, decoder.blocks.0.norm.weight, optimizer'),
    (dict(prefix='', unused=[], dtype='float32'), "  tensors  42/42, timm format in entry 'ema.model', float32; left "
     'aside: nothing'),
    (dict(run={**RUN, 'share': 0.437}), "  runs     layers 0 to 9 of 12, 17.6 GFLOPs an image, 44% of the step's"),
])
def test_str__one_part_changes_one_line(change, line):
    before, after = (str(receipt).splitlines() for receipt in (FULL, replace(FULL, **change)))
    assert [new for old, new in zip(before, after, strict=True) if new != old] == [line]


@pytest.mark.parametrize('change, left_out', [(dict(sha256=None), ['sha256']), (dict(run={}), ['tokens', 'runs'])])
def test_str__a_part_that_is_unknown_is_left_out(change, left_out):
    lines = str(FULL).splitlines()
    kept = [line for line in lines if line.split()[0] not in left_out]
    assert str(replace(FULL, **change)).splitlines() == kept
    assert len(lines) - len(kept) == len(left_out)


@pytest.mark.parametrize('receipt', [BARE, replace(FULL, run={**RUN, 'share': 0.437})])
def test_as_dict__survives_json_and_a_checkpoint(receipt, tmp_path):
    found = receipt.as_dict()
    assert json.loads(json.dumps(found)) == found
    torch.save(dict(teachers=dict(mae=found)), tmp_path / 'c.pth')
    again = torch.load(tmp_path / 'c.pth', weights_only=True)['teachers']['mae']
    assert again == found
    assert str(Receipt(**again)) == str(receipt)


def test_as_dict__is_a_copy():
    found = FULL.as_dict()
    found['run']['depth'] = found['unused'][0] = None
    assert (FULL.run['depth'], FULL.unused[0]) == (12, 'head.weight')


@pytest.mark.parametrize('file, memory, expected', [
    ({torch.float32}, torch.float32, 'float32'),
    ({torch.float16}, torch.float16, 'float16'),
    ({torch.float16}, torch.float32, 'float16 in the file, float32 in memory'),
    ({torch.float32, torch.bfloat16}, torch.float32, 'bfloat16, float32 in the file, float32 in memory'),
])
def test_dtype_note__tells_what_differs(file, memory, expected):
    assert dtype_note(file, memory) == expected
