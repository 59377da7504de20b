"""Hook for trainings that continue after an interruption as if it had not happened."""

from functools import partial
from typing import Any, Optional

from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, set_random_seed

# Difference between the seeds of two epochs. It exceeds the number of data workers of all ranks, which use consecutive
# seeds, so that no worker repeats the random numbers of another epoch.
EPOCH_SEED_STEP = 1_000_003


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Derives all random numbers of a training from its seed and the current iteration.

    MMEngine checkpoints hold weights and optimizer states, but no states of random number generators. A resumed
    training therefore draws other augmentations and box samples than an uninterrupted one. With this hook, a fixed
    ``randomness.seed`` and deterministic operations (all CPU operations are), both trainings are equal bit for bit.

    Epoch-based trainings create new data workers in each epoch. Iteration-based trainings must load data in workers.

    Raises:
        ValueError: ``randomness`` has no seed. Or an iteration-based training has ``num_workers=0``: its augmentations
            would depend on all previous iterations.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Checks the seed and the data loader.

        Args:
            runner: Runner of the training.
        """
        if runner._randomness_cfg.get('seed') is None:
            raise ValueError('ExactResumeHook requires a fixed seed, such as randomness=dict(seed=0), got None')
        if isinstance(runner.train_loop, IterBasedTrainLoop) and not runner.train_dataloader.num_workers:
            raise ValueError('ExactResumeHook requires num_workers >= 1 in iteration-based trainings, got 0')

    def before_train_epoch(self, runner: Runner) -> None:
        """Seeds the data workers for the epoch.

        Args:
            runner: Runner of the training.
        """
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            loader = runner.train_dataloader
            seed = runner.seed + EPOCH_SEED_STEP * (runner.epoch + 1)
            loader.worker_init_fn = partial(loader.worker_init_fn, seed=seed)
            loader._iterator = None  # persistent workers would keep their random states of the last epoch
            set_random_seed(seed + get_rank())

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Optional[Any] = None) -> None:
        """Seeds the random numbers of the model with a seed that no other iteration or rank uses.

        Args:
            runner: Runner of the training.
            batch_idx: Index of the batch in the epoch.
            data_batch: Batch of the iteration.
        """
        set_random_seed(runner.seed + runner.iter * get_world_size() + get_rank())
