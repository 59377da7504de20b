"""Recognizes the authors' files wherever MMEngine loads a checkpoint into a model with a backbone of this package.

``Runner``, ``init_detector``, ``init_model``, ``get_model`` and the inferencers of the toolboxes all load through
:mod:`mmengine.runner.checkpoint`, which passes over keys that it does not know. :func:`extend_mmengine` replaces its
last step, so that weights are renamed first and a file of another model is an error.
"""

import os
import pickle
from contextlib import suppress
from functools import wraps
from typing import Any, Callable, Dict, Mapping, Optional

import mmengine.runner.checkpoint as mmengine_checkpoint
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..models.backbones.base import Backbone
from .conversion import convert
from .reading import CheckpointError, download_once_per_node, is_torch_file, load, unwrap

# Parameters that are resized while loading, so that another shape in the file is no mismatch.
RESIZED = ('.pos_embed', '.rel_pos_h', '.rel_pos_w')


def match_names(model: nn.Module, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the weights of a checkpoint in the names of a model.

    Args:
        model: Model or backbone. If it is sharded or has no backbone of this package, ``content`` is returned as it is.
        content: State dict, or the content of a file that wraps one, in the names of the model or in any layout that
            :func:`mmvitzoo.checkpoints.convert` knows.

    Returns:
        ``content`` itself if it has the names of the model.

    Raises:
        CheckpointError: The layout is unknown, or the weights belong to another model: less than half of the tensors
            of the model and of its backbone are in the file, or have another shape there.
    """
    model = _unwrap_model(model)
    name, backbone = next(((x, y) for x, y in model.named_modules() if isinstance(y, Backbone)), ('', None))
    sharded = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    if backbone is None or sharded:  # a sharded model does not tell its names, and loads with strict=True
        return content
    expected = {key: value for key, value in model.state_dict().items() if 'num_batches_tracked' not in key}
    inside = [key for key in expected if key.startswith(f'{name}.' if name else '')]
    if 2 * sum(key in content for key in inside) >= len(inside):
        weights = content
    else:
        weights = unwrap(content)
        if 2 * sum(key in weights for key in inside) < len(inside):
            result = convert(weights, family=backbone.family)
            try:
                backbone.check_conversion(result)
            except ValueError as error:
                raise CheckpointError(str(error)) from None
            print_log(f'Converted the checkpoint from the {result.family}/{result.source} layout', logger='current')
            weights = result.state_dict if name else result.backbone
    found = [key for key, value in expected.items() if _fits(key, value, weights.get(key))]
    if 2 * len(found) < len(expected) and 2 * sum(key in found for key in inside) < len(inside):
        raise CheckpointError(
            f'only {len(found)} of the {len(expected)} tensors of {type(model).__name__} are in the checkpoint with '
            f'their shape; it belongs to another model. Its first keys: {", ".join(list(weights)[:3])}'
        )
    return weights


def _unwrap_model(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _fits(key: str, own: Tensor, loaded: Optional[Tensor]) -> bool:
    return loaded is not None and (loaded.shape == own.shape or f'.{key}'.endswith(RESIZED))


def prepare_checkpoint(runner: Runner, checkpoint: Dict[str, Any]) -> None:
    """Renames the weights of a checkpoint that a runner has read, in place.

    Args:
        runner: Runner that trains, validates or tests.
        checkpoint: Content of the file.

    Raises:
        CheckpointError: As in :func:`match_names`. Or the runner resumes from a file that MMEngine did not write, or
            evaluates a model of which a whole part is not in the file.
    """
    if not any(isinstance(module, Backbone) for module in runner.model.modules()):
        return
    content, file = checkpoint.get('state_dict', checkpoint), runner._load_from or 'checkpoint'
    model = _unwrap_model(runner.model)
    try:
        weights = match_names(model, content)
    except CheckpointError as error:
        raise CheckpointError(f'{file}: {error}') from None
    if runner._resume and 'message_hub' not in checkpoint:
        raise CheckpointError(f'{file}: MMEngine did not write it, so no training can resume from it; use load_from')
    parts = [name for name, part in model.named_children() if any(True for _ in part.parameters())]
    absent = [part for part in parts if not any(key.startswith(f'{part}.') for key in weights)]
    # Loops are built when train, val or test is called.
    trains, *evaluates = (isinstance(x, BaseLoop) for x in (runner._train_loop, runner._val_loop, runner._test_loop))
    if absent and any(evaluates) and not trains:
        raise CheckpointError(f'{file}: has no weights of {", ".join(absent)}, so the model cannot be evaluated')
    if absent:
        print_log(f'{file}: has no weights of {", ".join(absent)}, initial values are kept', logger='current')
    checkpoint['state_dict'] = weights


def extend_mmengine() -> None:
    """Lets MMEngine and the toolboxes recognize the authors' files; done once, on import of this package."""
    loader = mmengine_checkpoint.CheckpointLoader
    if getattr(mmengine_checkpoint.load_state_dict, 'extended', False):
        return
    mmengine_checkpoint.load_state_dict = _extend_load_state_dict(mmengine_checkpoint.load_state_dict)
    Runner.call_hook = _extend_call_hook(Runner.call_hook)
    loader.register_scheme('', _load_local, force=True)
    loader.register_scheme(('http://', 'https://'), _load_http, force=True)


def _extend_load_state_dict(original: Callable) -> Callable:
    @wraps(original)
    def load_state_dict(module, state_dict, *args, **kwargs):
        return original(module, match_names(module, state_dict), *args, **kwargs)

    load_state_dict.extended = True
    return load_state_dict


def _extend_call_hook(original: Callable) -> Callable:
    @wraps(original)
    def call_hook(runner, fn_name, **kwargs):
        if fn_name == 'after_load_checkpoint':  # before the hooks, which may copy the weights
            prepare_checkpoint(runner, kwargs['checkpoint'])
        return original(runner, fn_name, **kwargs)

    return call_hook


def _load_local(filename: str, map_location: Any) -> Any:
    path = os.path.expanduser(filename)
    checkpoint = None
    if not os.path.isfile(path) or is_torch_file(path):
        with suppress(pickle.UnpicklingError):  # it holds more than weights, which torch refuses
            checkpoint = mmengine_checkpoint.load_from_local(filename, map_location)
    return _with_meta(load(path) if checkpoint is None else checkpoint)


def _load_http(filename: str, map_location: Any = None, **kwargs: Any) -> Any:
    if not filename.endswith(('.pkl', '.safetensors')):
        return _with_meta(mmengine_checkpoint.load_from_http(filename, map_location, **kwargs))
    download_once_per_node(filename)
    return _with_meta(load(filename))


def _with_meta(checkpoint: Any) -> Any:
    """Adds the entry ``meta``, which MMSegmentation expects in every file."""
    if not isinstance(checkpoint, dict) or 'meta' in checkpoint:
        return checkpoint
    if any(isinstance(value, Tensor) for value in checkpoint.values()):
        checkpoint = dict(state_dict=checkpoint)
    return dict(checkpoint, meta={})
