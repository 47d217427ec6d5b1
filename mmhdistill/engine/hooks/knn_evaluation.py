from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from ...registry import HOOKS
from .own_seed import own_seed


@HOOKS.register_module()
class KNNEvaluationHook(Hook):
    """Weighted k-NN of the student while it is trained, by the config's ``test_dataloader`` and ``test_evaluator``.

    Scalars for every visualizer backend: ``knn/patch`` and ``knn/cls`` of the student and, as constant lines to hold
    it against, ``knn/<teacher>`` of each teacher's mean patch token, which is measured once, at the first evaluation.
    Training draws the same random numbers with the hook and without.

    Args:
        interval: epochs between evaluations; the first comes before training.
    """

    priority = 'LOW'

    def __init__(self, interval: int = 10):
        if interval < 1:
            raise ValueError(f'interval={interval}: give at least 1 epoch.')
        self.interval = interval
        self._teachers: dict[str, float] | None = None

    def before_train(self, runner: Runner) -> None:
        if runner.test_loop is None:
            raise ValueError('KNNEvaluationHook needs test_dataloader, test_cfg and test_evaluator in the config, with '
                             'a KNNMetric: take those of the recipes, or leave the hook out.')
        if runner.epoch == 0:
            self._evaluate(runner, 0)

    def after_train_epoch(self, runner: Runner) -> None:
        if self.every_n_epochs(runner, self.interval) or self.is_last_train_epoch(runner):
            self._evaluate(runner, runner.iter)

    def _evaluate(self, runner: Runner, step: int) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        training, model.predicts_teachers = runner.model.training, self._teachers is None
        with own_seed():
            metrics = runner.test_loop.run()
        model.predicts_teachers = False
        runner.model.train(training)
        if self._teachers is None:
            self._teachers = {name: value for name, value in metrics.items()
                              if name.rpartition('/')[2] in getattr(model, 'teachers', {})}
        metrics.update(self._teachers)
        found = ', '.join(f'{name} {value:.2f}' for name, value in metrics.items())
        MMLogger.get_current_instance().info(f'after {step} iterations: {found}')
        runner.visualizer.add_scalars(metrics, step=step)
