"""Trainings that go on after a stop as if there had been none."""

from functools import partial
from typing import Any, Optional

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, set_random_seed

# Between the seeds of two epochs, for more iterations and workers than there are.
EPOCH_STEP = 1_000_003


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Makes what is random in a training depend on its seed and the iteration alone.

    MMEngine stores weights and optimizer states, but not the state of the random number generators, so that
    a training that was stopped and resumed sees other augmentations and other samples of boxes than one that
    was not. With this hook, a fixed ``randomness.seed`` and deterministic operations (as all are on a CPU),
    both are the same bit for bit, whatever stopped the first one.

    Trainings by epochs get new data workers in each, trainings by iterations read their data in the workers.

    Raises:
        ValueError: ``randomness`` has no seed; or a training by iterations has ``num_workers=0``, whose data
            would depend on all iterations before.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Checks the config.

        Args:
            runner: Of the training.
        """
        if runner._randomness_cfg.get('seed') is None:
            raise ValueError('ExactResumeHook needs a fixed seed: randomness=dict(seed=0)')
        if isinstance(runner.train_loop, IterBasedTrainLoop) and not runner.train_dataloader.num_workers:
            raise ValueError('ExactResumeHook: a training by iterations needs num_workers of at least 1')

    def before_train_epoch(self, runner: Runner) -> None:
        """Seeds the workers of an epoch.

        Args:
            runner: Of the training.
        """
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            loader = runner.train_dataloader
            seed = runner.seed + EPOCH_STEP * (runner.epoch + 1)
            loader.worker_init_fn = partial(loader.worker_init_fn, seed=seed)
            loader._iterator = None  # persistent workers would go on where the last epoch left them
            set_random_seed(seed + get_rank())

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Optional[Any] = None) -> None:
        """Seeds the model's own random numbers.

        Args:
            runner: Of the training.
            batch_idx: Number of the batch in its epoch.
            data_batch: The batch.
        """
        set_random_seed(runner.seed + runner.iter + get_rank())
