"""Memory that a teacher needs while it is built and loaded, of the size of a ViT-B."""
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmhdistill.models.teachers import CARDS, ViTTeacher
from mmhdistill.models.teachers.formats import FORMATS

CARD = asdict(CARDS['clip-vit-b-p16'])
OPENAI = next(fmt for fmt in FORMATS if fmt.name == 'openai-clip')
# A part of the text tower, which the published files hold too.
TEXT = {'token_embedding.weight': (49408, 512)}

pytestmark = pytest.mark.xdist_group('large models')


class Holder(nn.Module):
    """A module that holds parameters by their dotted names; torch scripts no empty forward."""

    def forward(self, x):
        return x


def hold(root, name, tensor):
    *parents, leaf = name.split('.')
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, Holder())
        root = root._modules[parent]
    root.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def write(kind, path, dtype):
    """Weights under the names of the published files, each tensor of its own storage."""
    own = ViTTeacher(CARD, checkpoint='unused').vit.state_dict()
    shapes = {f'visual.{OPENAI.sources(key)[0]}': x.shape for key, x in own.items()} | TEXT
    state = {name: torch.full(shape, 0.1, dtype=dtype) for name, shape in shapes.items()}
    if kind == 'safetensors':
        save_file(state, path)
    elif kind == 'torchscript':
        root = Holder()
        for name, tensor in state.items():
            hold(root, name, tensor)
        torch.jit.script(root).save(path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == 'zip')


def resident(kind):
    """VmRSS or its peak VmHWM of this process, in bytes."""
    return int(re.search(rf'{kind}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024


def growth(path):
    """Bytes by which the peak of construction and loading lies above what this process held before."""
    # Whatever torch and mmengine allocate once.
    ViTTeacher({**CARD, 'depth': 1, 'embed_dims': 24}, checkpoint=None)
    Path('/proc/self/clear_refs').write_text('5')
    before = resident('VmRSS')
    teacher = ViTTeacher(CARD, checkpoint=path)
    built = resident('VmHWM') - before
    teacher.load()
    peak = resident('VmHWM') - before
    total = sum(p.element_size() * p.numel() for p in teacher.parameters())
    assert {(p.device.type, p.dtype) for p in teacher.parameters()} == {('cpu', torch.float32)}
    return built, peak, total


def in_a_clean_process(work, *args):
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        return pool.submit(work, *args).result()


@pytest.fixture(scope='session')
def files(tmp_path_factory):
    """The file of a kind, written when first asked for."""
    folder, written = tmp_path_factory.mktemp('large'), {}

    def path(kind, dtype):
        if kind not in written:
            written[kind] = folder / ('w.safetensors' if kind == 'safetensors' else f'{kind}.pt')
            write(kind, written[kind], dtype)
        return written[kind]

    yield path
    for file in written.values():
        file.unlink()


@pytest.mark.parametrize('kind', ['zip', 'safetensors', 'legacy'])
def test_load__holds_the_file_once(kind, files):
    path = files(kind, torch.float32)
    size = path.stat().st_size
    built, peak, total = in_a_clean_process(growth, str(path))
    print(f'\n{kind}: file {size / 1e6:.0f} MB, built {built / size:.3f}, peak {peak / size:.3f} of it')
    assert size > 2e8
    assert built < 0.05 * size
    # At least what is resident in the end, else the measurement itself is broken.
    assert 0.95 * total < peak < 1.2 * size


def test_load__half_precision_archive_gives_way_to_its_single_precision_copy(files):
    path = files('torchscript', torch.float16)
    size = path.stat().st_size
    built, peak, total = in_a_clean_process(growth, str(path))
    print(f'\ntorchscript: file {size / 1e6:.0f} MB, weights {total / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, '
          f'bound {(total + 0.6 * size) / 1e6:.0f} MB')
    assert size > 2e8
    assert built < 0.05 * size
    # Halves are given back as they are turned; a quarter of the file, the text tower, stays until the end.
    assert 0.95 * total < peak < total + 0.6 * size
