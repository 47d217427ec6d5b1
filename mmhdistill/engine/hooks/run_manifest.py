import json
from collections.abc import Sequence
from pathlib import Path

from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ...registry import HOOKS
from ..checkpoints import write_atomically
from ..manifest import GUARDED, describe_run, differences, fingerprint, teacher_receipts

_LINES = 30


# The second name is that of configs of former days.
@HOOKS.register_module(name=['RunManifest', 'TeacherManifest'])
class RunManifest(Hook):
    """Writes down what a run is made of, and refuses to resume one as something else.

    ``manifest.json`` in the work folder (and in the log folder of each start) and ``manifest`` in checkpoints:
    :func:`mmhdistill.engine.manifest.describe_run`. The receipts of the teachers, which are in no checkpoint
    themselves, are also ``teachers.json`` in the log folder and ``teachers`` in checkpoints, where a model that goes on
    with a student, a classifier for example, finds those of the student's teachers.

    Args:
        allow_changed: of ``student``, ``teachers`` and ``losses``, what a resumed run may have other than its
            checkpoint; all other changes are told in the log.

    Raises:
        ValueError: on resuming with another student, other teachers or losses; it lists the differences. Or processes
            that list other data than each other, of which mmengine's samplers know nothing.
    """

    priority = 'NORMAL'

    def __init__(self, allow_changed: Sequence[str] = ()):
        if unknown := sorted(set(allow_changed) - set(GUARDED)):
            raise ValueError(f'allow_changed has {", ".join(unknown)}: it takes {", ".join(GUARDED)}.')
        self.allow_changed = tuple(allow_changed)
        self._manifest: dict | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if not runner._resume:
            return
        before = checkpoint.get('manifest')
        if before is None:
            runner.logger.warning('the checkpoint has no manifest: whether student, teachers and losses are those it '
                                  'was trained with is unknown')
            return
        found = differences(before, self._describe(runner))
        refused = {name: lines for name, lines in found.items()
                   if lines and name in GUARDED and name not in self.allow_changed}
        if refused:
            text = '\n'.join(f'{name}\n{_listed(lines)}' for name, lines in refused.items())
            raise ValueError(f'the checkpoint is of a run with other {" and ".join(refused)} (before -> now):\n{text}\n'
                             'Resume with what it was trained with; to go on with the change, --allow-changed '
                             f'{" ".join(refused)}; to start a new run from its weights, load_from without --resume.')
        if changed := [line for lines in found.values() for line in lines]:
            runner.logger.warning(f'the resumed run differs from its checkpoint (before -> now):\n{_listed(changed)}')

    def before_train(self, runner: Runner) -> None:
        _check_same_data('training', runner.train_dataloader)
        if runner.val_loop is not None:
            _check_same_data('validation', runner.val_dataloader)
        if is_main_process():
            self._write(runner)

    def before_test(self, runner: Runner) -> None:
        _check_same_data('test', runner.test_dataloader)

    def _write(self, runner: Runner) -> None:
        text = json.dumps(self._describe(runner), indent=1) + '\n'
        Path(runner.log_dir, 'manifest.json').write_text(text)
        write_atomically(Path(runner.work_dir, 'manifest.json'), text.encode())
        if receipts := teacher_receipts(runner):
            Path(runner.log_dir, 'teachers.json').write_text(json.dumps(receipts, indent=1) + '\n')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['manifest'] = self._describe(runner)
        if receipts := teacher_receipts(runner):
            checkpoint['teachers'] = receipts

    def _describe(self, runner: Runner) -> dict:
        if self._manifest is None:
            self._manifest = describe_run(runner)
        # Of the checkpoint, where the config has none.
        self._manifest['seeds']['seed'] = getattr(runner, 'base_seed', runner.seed)
        return self._manifest


def _check_same_data(what: str, loader: DataLoader) -> None:
    """Each process takes its share of a list of its own."""
    found = all_gather_object(fingerprint(loader.dataset))
    if any(data != found[0] for data in found):
        counts = [data['count'] for data in found]
        raise ValueError(
            f'the processes do not list the same {what} data: {", ".join(map(str, counts))} samples, process by process'
            f'{", of other names" if len(set(counts)) == 1 else ""}. Each would take its share of a list of its own, '
            'and they would wait for each other at the end of an epoch. Give all machines the same files, in folders '
            'of the same names.')


def _listed(lines: list[str]) -> str:
    more = [f'... and {len(lines) - _LINES} more'] if len(lines) > _LINES else []
    return '\n'.join(f'  {line}' for line in lines[:_LINES] + more)
