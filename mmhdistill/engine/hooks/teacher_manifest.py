import json
from pathlib import Path

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from ...registry import HOOKS


@HOOKS.register_module()
class TeacherManifest(Hook):
    """Keeps the receipts of the teachers: ``teachers.json`` in the run's log folder, ``teachers`` in its checkpoints.

    Teachers themselves are in no checkpoint; the receipts say which files they were, by sha256. What goes on with a
    student, a classifier for example, keeps the receipts of the student's teachers.
    """

    priority = 'NORMAL'

    @master_only
    def before_train(self, runner: Runner) -> None:
        if manifest := _manifest(runner):
            Path(runner.log_dir, 'teachers.json').write_text(json.dumps(manifest, indent=1) + '\n')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if manifest := _manifest(runner):
            checkpoint['teachers'] = manifest


def _manifest(runner: Runner) -> dict:
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if hasattr(model, 'manifest'):
        return model.manifest
    return {name: receipt for module in model.modules()
            for name, receipt in getattr(module, 'started_from', {}).get('teachers', {}).items()}
