"""The receipt of a loaded teacher: what was read, and how it will be run."""
from dataclasses import asdict, dataclass, field

import torch


@dataclass
class Receipt:
    """Printed once per teacher, and kept in the run's manifest.

    Attributes:
        model: card, or name in the library that built it.
        source: the weight file, or what a library fetched.
        format: of the file, and ``prefix``, where the ViT lay in it; ``entry``, the dict in the file.
        matched, total: tensors loaded, of those that the model has.
        unused: names in the file that were left aside.
        published: whether the file has the hash that its publisher, or the user, gave; None where none is known.
        dtype: in the file and in memory, where they differ.
        mean, std: normalisation of the images it sees, RGB in 0-255.
        run: filled by the distiller: grid, image size, taps, deepest layer, FLOPs.
    """

    name: str
    model: str
    source: str
    matched: int
    total: int
    mean: list[float]
    std: list[float]
    format: str = ''
    prefix: str = ''
    entry: str = ''
    unused: list[str] = field(default_factory=list)
    sha256: str | None = None
    published: bool | None = None
    dtype: str = 'float32'
    licence: str = ''
    run: dict = field(default_factory=dict)
    role: str = 'teacher'

    def as_dict(self) -> dict:
        """For the manifest, JSON types only."""
        return asdict(self)

    def __str__(self) -> str:
        licence = f' (licence {self.licence})' if self.licence else ''
        lines = [f"{self.role} '{self.name}': {self.model}{licence}", f'  file     {self.source}']
        if self.sha256:
            verdict = {True: 'as expected', False: 'another file than the published one',
                       None: 'not pinned: compare it with a source that you trust'}[self.published]
            lines.append(f'  sha256   {self.sha256}, {verdict}')
        where = f" under '{self.prefix}'" if self.prefix else ''
        where += f" in entry '{self.entry}'" if self.entry else ''
        form = f', {self.format} format{where}' if self.format else ''
        lines.append(f'  tensors  {self.matched}/{self.total}{form}, {self.dtype}; left aside: {self._groups()}')
        mean, std = (' '.join(f'{x:.2f}' for x in values) for values in (self.mean, self.std))
        lines.append(f'  images   RGB mean {mean}, std {std} in 0-255')
        return '\n'.join(lines + [f'  {key:<8} {value}' for key, value in self._run_lines()])

    def _groups(self) -> str:
        groups: dict[str, list[str]] = {}
        for name in self.unused:
            groups.setdefault(name.split('.')[0], []).append(name)
        return ', '.join(names[0] if len(names) == 1 else f'{head}.* ({len(names)})'
                         for head, names in groups.items()) or 'nothing'

    def _run_lines(self) -> list[tuple[str, str]]:
        run = self.run
        if not run:
            return []
        grid = 'x'.join(map(str, run['grid']))
        size = 'x'.join(map(str, run['image_size']))
        tokens = f'{size} px, {grid} patches; extra tokens: {run["extra_tokens"]}; positions {run["positions"]}'
        depth = f"layers 0 to {run['deepest_layer']} of {run['depth']}"
        gflops = run['gflops']
        cost = f'{gflops:.1f} GFLOPs an image' if gflops >= 0.1 else f'{1000 * gflops:.1f} MFLOPs an image'
        if 'share' in run:
            cost += f", {run['share']:.0%} of the step's"
        return [('tokens', tokens), ('runs', f'{depth}, {cost}')]


def dtype_note(file: set[torch.dtype], memory: torch.dtype) -> str:
    """Precision of the weights in memory and, where it is another, in the file."""
    names, own = sorted(str(x).removeprefix('torch.') for x in file), str(memory).removeprefix('torch.')
    return own if names == [own] else f'{", ".join(names)} in the file, {own} in memory'
