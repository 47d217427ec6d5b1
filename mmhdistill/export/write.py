"""A student, written for another library, with a manifest beside it."""
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..models.teachers.files import file_digest
from ..version import __version__
from .graphs import onnx_obstacles, write_onnx, write_torch
from .libraries import huggingface_obstacles, timm_obstacles, write_huggingface, write_mmpretrain, write_timm
from .student import Student, load_student

_FOLDER = {'config.json', 'model.safetensors', 'preprocessor_config.json'}


@dataclass(frozen=True)
class Target:
    """Attributes:
        suffix: of the file; none for a folder.
        write: writes a student to a path that does not exist; returns what the manifest says of it.
        obstacles: what it cannot express of a student.
    """

    suffix: str
    write: Callable[[Student, Path], dict]
    obstacles: Callable[[Student], list[str]] = lambda student: []


TARGETS = dict(
    mmpretrain=Target('.pth', write_mmpretrain),
    timm=Target('.safetensors', write_timm, timm_obstacles),
    huggingface=Target('', write_huggingface, huggingface_obstacles),
    torch=Target('.pt2', write_torch),
    onnx=Target('.onnx', write_onnx, onnx_obstacles))


def export(checkpoint: str | Path, target: str, config: str | None = None, out: str | Path | None = None,
           img_size: int | None = None, force: bool = False) -> tuple[Path, dict]:
    """Write the student of ``checkpoint`` for ``target``; returns where, and its manifest, ``<out>.json``.

    The features of every export are those of the student: of (B, 3, H, W) normalised images, all tokens after the final
    norm, (B, E + N, C), the class token first.

    Args:
        target: a key of ``TARGETS``.
        config: of the run; by default the one in the checkpoint.
        out: file, or folder for ``huggingface``; by default beside the checkpoint, named after it, ``img_size`` and
            the target.
        img_size: side of the images, in pixels, by default the student's; for another one positions are resampled.
        force: replace an earlier export.

    Raises:
        ValueError: not a student, or one that ``target`` cannot express.
        FileExistsError: there is something at ``out`` that may not be replaced.
    """
    checkpoint = Path(checkpoint).expanduser()
    size = f'_{img_size}px' if img_size is not None else ''
    suffix = TARGETS[target].suffix
    out = Path(out).expanduser() if out else checkpoint.with_name(f'{checkpoint.stem}{size}_{target}{suffix}')
    if suffix and out.suffix != suffix:
        raise ValueError(f'an export to {target} is a {suffix} file, got --out {out}: give it that ending.')
    manifest_file = out.with_name(f'{out.name}.json')
    _check_free(checkpoint, out, manifest_file, force, folder=not suffix)
    student = load_student(checkpoint, config)
    if img_size is not None:
        student = student.at(img_size)
    if obstacles := TARGETS[target].obstacles(student):
        able = [name for name, other in TARGETS.items() if not other.obstacles(student)]
        raise ValueError(f'{target} cannot express this student: {", ".join(obstacles)}. Export it to '
                         f'{", ".join(able[:-1])} or {able[-1]}.')
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, so that nothing but a rename is left to do: whatever lies at ``out`` is whole.
    room = Path(tempfile.mkdtemp(dir=out.parent, prefix=f'.{out.name}.'))
    try:
        written = room / out.name
        notes = TARGETS[target].write(student, written)
        files = sorted(written.iterdir()) if written.is_dir() else [written]
        manifest = dict(
            **student.origin, target=target, files={file.name: file_digest(file) for file in files},
            architecture=student.backbone, image_size=list(student.image_size),
            normalisation=dict(mean=student.mean, std=student.std, images=f'in 0-255, {student.channels}'),
            features='all tokens after the final norm, the class token first' if student.vit.with_cls_token else
            'all tokens after the final norm', mmhdistill=__version__, **notes)
        (room / manifest_file.name).write_text(json.dumps(manifest, indent=1) + '\n')
        _check_free(checkpoint, out, manifest_file, force, folder=not suffix)
        if out.is_dir():
            out.rename(room / f'{out.name}.replaced')  # A folder with files in it cannot be replaced in one step.
        os.replace(written, out)
        os.replace(room / manifest_file.name, manifest_file)
    finally:
        shutil.rmtree(room)
    return out, manifest


def _check_free(checkpoint: Path, out: Path, manifest: Path, force: bool, folder: bool) -> None:
    there = [path for path in (out, manifest) if path.exists() or path.is_symlink()]
    if not there:
        return
    if not force:
        raise FileExistsError(f'{there[0]} exists already: give another --out, or --force to replace it.')
    if any(path.exists() and path.samefile(checkpoint) for path in there if checkpoint.exists()):
        raise FileExistsError(f'{out} is the checkpoint itself, which is never replaced: give another --out.')
    if out.exists() and out.is_dir() != folder:
        raise FileExistsError(f'{out} is a {"folder" if out.is_dir() else "file"}, and the export is none: give '
                              'another --out.')
    if out.is_dir() and (others := sorted({path.name for path in out.iterdir()} - _FOLDER)):
        raise FileExistsError(f'{out} holds more than an export ({", ".join(others[:3])}), and is not replaced: give '
                              'another --out.')
