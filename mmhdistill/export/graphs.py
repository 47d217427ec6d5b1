"""The student as a program, for a runtime that knows no model code."""
from pathlib import Path

import torch
from torch import Tensor

from ..models.teachers.optional import require
from .student import Features, Student

# [choice] of the largest feature; kernels of another order of summation differ by some 1e-6 of it.
_TOLERANCE = 1e-4
_ONNX_LIMIT = 2**31


def write_torch(student: Student, path: Path) -> dict:
    """A ``torch.export`` program, run by ``torch.export.load(path).module()(images)``; any number of images."""
    torch.export.save(_program(student), path)
    return _check(student, torch.export.load(path).module(), 'torch.export')


def onnx_obstacles(student: Student) -> list[str]:
    size = sum(x.nbytes for x in student.vit.state_dict().values())
    return [f'{size / 2**30:.1f} GiB of weights in one file (2 at most)'] if size >= _ONNX_LIMIT else []


def write_onnx(student: Student, path: Path) -> dict:
    """A model of one input ``images`` and one output ``features``; any number of images. Run once by onnxruntime."""
    for module in ('onnx', 'onnxscript'):
        require(module, 'export to onnx')
    runtime = require('onnxruntime', 'export to onnx')
    torch.onnx.export(_program(student), f=path, input_names=['images'], output_names=['features'], external_data=False,
                      verbose=False)
    session = runtime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return _check(student, lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0]),
                  'onnxruntime')


def _program(student: Student) -> torch.export.ExportedProgram:
    # A batch of one would be taken for a constant.
    program = torch.export.export(Features(student.vit).eval(), (_images(student, 2), ),
                                  dynamic_shapes=dict(images={0: torch.export.Dim('batch')}))
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # Paths of this machine.
    return program


def _images(student: Student, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, student.vit.patch_embed.projection.in_channels, *student.image_size, generator=generator)


@torch.no_grad()
def _check(student: Student, run, runtime: str) -> dict:
    """Largest difference of what was written from the student, on three images of noise."""
    images = _images(student, 3)
    expected = student.vit(images)[0]
    difference, largest = (run(images) - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= _TOLERANCE * largest:
        raise RuntimeError(f'{runtime} gives features that differ from the student\'s by {difference:.3g}, the largest '
                           f'being {largest:.3g}: this version of it computes another model. Nothing was written; try '
                           'another version, or another target.')
    return dict(max_difference=difference)
