"""Recognizes the authors' files wherever MMEngine loads a checkpoint into a model with a backbone of this package.

``Runner``, ``init_detector``, ``init_model``, ``get_model`` and the inferencers of the toolboxes all load through
:mod:`mmengine.runner.checkpoint`, which passes over keys that it does not know. :func:`extend_mmengine` replaces its
last step, so that weights are renamed first and a file of another model is an error.
"""

import os
import pickle
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from logging import WARNING
from typing import Any, Callable, Dict, Iterator, Mapping, Optional

import mmengine.runner.checkpoint as mmengine_checkpoint
import torch
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import BaseLoop, Runner
from mmengine.utils import digit_version
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..models.backbones.base import Backbone
from ..models.backbones.vit_weights import backbone_metadata
from .conversion import ConversionResult, convert_for, refuse_lora
from .reading import CheckpointError, download_once_per_node, is_torch_file, load, unwrap, with_metadata

# Parameters that are resized while loading, so that another shape in the file is no mismatch.
RESIZED = ('.pos_embed', '.rel_pos_h', '.rel_pos_w', '.patch_embed.proj.weight')
# Whether a model that lacks weights is an error, see refuse_missing_weights.
MISSING_REFUSED = ContextVar('missing_refused', default=False)


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
            of the model and of its backbone are in the file, or have another shape there. Or the file tells other
            arguments, see :meth:`.Backbone.check_compatible`, or is for images of other channels, see
            :meth:`.Backbone.weights_to_adapt`.
    """
    if not _is_supported(model):
        return content
    model = _unwrap_model(model)
    name, backbone = next((name, module) for name, module in model.named_modules() if isinstance(module, Backbone))
    expected = _expected(model)
    prefix = f'{name}.' if name else ''
    inside = [key for key in expected if key.startswith(prefix)]
    weights = content
    if not _has_own_names(weights, model, prefix):
        weights = unwrap(content)
    if _has_own_names(weights, model, prefix):
        if backbone_metadata(weights) is not None:
            _check_own_weights(weights, backbone, prefix)
    else:
        try:
            result = convert_for(backbone, weights)
        except CheckpointError:
            # A part of a model of this package is no checkpoint of any layout. It has no other keys than the model.
            own = model.state_dict().keys()
            is_part = all(key in own for key in weights if key.startswith(prefix))
            if not is_part or 2 * sum(key in weights for key in inside) < len(inside):
                raise
        else:
            _check_compatible(backbone, result)
            if result.source != 'mmvitzoo':
                print_log(f'Converted the checkpoint from the {result.family}/{result.source} layout', logger='current')
            if result.note:
                print_log(f'{type(backbone).__name__}: {result.note}', logger='current')
            weights = result.state_dict if name else result.backbone
    refuse_lora([key for key in weights if key not in expected])
    try:
        adapted = backbone.weights_to_adapt(weights, prefix)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    found = [key for key, value in expected.items() if key in adapted or _fits(key, value, weights.get(key))]
    if 2 * len(found) < len(expected) and 2 * sum(key in found for key in inside) < len(inside):
        _check_own_weights(weights, backbone, prefix)
        raise CheckpointError(
            f'only {len(found)} of the {len(expected)} tensors of {type(model).__name__} are in the checkpoint with '
            f'their shape; it belongs to another model. Its first keys: {", ".join(list(weights)[:3])}'
        )
    return weights


def _has_own_names(weights: Mapping[str, Any], model: nn.Module, prefix: str) -> bool:
    """Returns whether a file has the names of the model: its metadata say so, or the backbone has these keys alone.

    Most names of other sources may be the same, and the weights mean something else.
    """
    inside = {key for key in model.state_dict() if key.startswith(prefix)}
    loaded = {key for key in weights if isinstance(key, str) and key.startswith(prefix)}
    if backbone_metadata(weights) is not None:
        return 2 * len(inside & loaded) >= len(inside)
    needed = {key for key in _expected(model) if key.startswith(prefix)}
    return needed <= loaded <= inside


def _check_own_weights(weights: Mapping[str, Any], backbone: Backbone, prefix: str) -> None:
    """Refuses weights that have the names of a model and tell that they belong to another one."""
    metadata = backbone_metadata(weights)
    own = {key[len(prefix) :]: x for key, x in weights.items() if isinstance(x, Tensor) and key.startswith(prefix)}
    try:
        result = convert_for(backbone, with_metadata(own, metadata, module=''))
    except CheckpointError:  # a part of a model, or one with additions
        return
    _check_compatible(backbone, result)


def _check_compatible(backbone: Backbone, result: ConversionResult) -> None:
    try:
        backbone.check_compatible(result)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    backbone.log_differences(result)


def _is_supported(model: nn.Module) -> bool:
    """Returns whether a model has a backbone of this package and is not sharded: parts of FSDP have no full names."""
    modules = list(model.modules())
    sharded = any(isinstance(module, FullyShardedDataParallel) for module in modules)
    return not sharded and any(isinstance(module, Backbone) for module in modules)


def _expected(model: nn.Module) -> Dict[str, Tensor]:
    # Files of other sources lack the buffers of rotary positions, and the model keeps its own.
    ignored = ('num_batches_tracked', 'rope.periods', 'rope.grid')
    return {key: value for key, value in model.state_dict().items() if not key.endswith(ignored)}


def _unwrap_model(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _fits(key: str, own: Tensor, loaded: Optional[Tensor]) -> bool:
    return loaded is not None and (loaded.shape == own.shape or f'.{key}'.endswith(RESIZED))


def _missing(model: nn.Module, weights: Mapping[str, Any]) -> str:
    """Returns the part of a message that counts the weights a model would not get, empty if it gets all."""
    model = _unwrap_model(model)
    expected = _expected(model)
    missing = [key for key, value in expected.items() if not _fits(key, value, weights.get(key))]
    if not missing:
        return ''
    key = missing[-1]
    shape = f' of shape {tuple(expected[key].shape)}, there {tuple(weights[key].shape)}' if key in weights else ''
    return f'lacks {len(missing)} weights of {type(model).__name__}, such as {key}{shape}'


@contextmanager
def refuse_missing_weights() -> Iterator[None]:
    """Makes loading an error if the model has a backbone of this package and would keep some of its random weights.

    Inferencers load within this context. A training may start from a part of the weights.
    """
    token = MISSING_REFUSED.set(True)
    try:
        yield
    finally:
        MISSING_REFUSED.reset(token)


def prepare_checkpoint(runner: Runner, checkpoint: Dict[str, Any]) -> None:
    """Renames the weights of a checkpoint that a runner has read, in place.

    Args:
        runner: Runner that trains, validates or tests.
        checkpoint: Content of the file.

    Raises:
        CheckpointError: The file belongs to another model, see :func:`match_names`. The runner resumes from a file that
            MMEngine did not write. Or it evaluates a model and the file lacks some of its weights.
    """
    if not _is_supported(runner.model):
        return
    file = runner._load_from or 'checkpoint'
    try:
        weights = match_names(runner.model, checkpoint.get('state_dict', checkpoint))
    except CheckpointError as error:
        raise CheckpointError(f'{file}: {error}') from None
    if runner._resume and 'message_hub' not in checkpoint:
        raise CheckpointError(f'{file}: MMEngine did not write it, so no training can resume from it; use load_from')
    # Loops are built when train, val or test is called. A training may start from a part of the weights, with
    # a warning. An evaluation may not.
    trains, *evaluates = (isinstance(x, BaseLoop) for x in (runner._train_loop, runner._val_loop, runner._test_loop))
    missing = _missing(runner.model, weights) if any(evaluates) and not trains else ''
    if missing:
        raise CheckpointError(f'{file}: {missing}, so the model cannot be evaluated')
    checkpoint['state_dict'] = dict(weights) if weights is checkpoint else weights


def extend_mmengine() -> None:
    """Lets MMEngine and the toolboxes recognize the authors' files; done once, on import of this package."""
    loader = mmengine_checkpoint.CheckpointLoader
    if getattr(mmengine_checkpoint.load_state_dict, 'extended', False):
        return
    mmengine_checkpoint.load_state_dict = _extend_load_state_dict(mmengine_checkpoint.load_state_dict)
    mmengine_checkpoint._load_checkpoint_to_model = _extend_load_to_model(mmengine_checkpoint._load_checkpoint_to_model)
    Runner.call_hook = _extend_call_hook(Runner.call_hook)
    # MMEngine logs what follows `load_from_` in these names.
    loader.register_scheme('', load_from_local, force=True)
    loader.register_scheme(('http://', 'https://'), load_from_http, force=True)


def _extend_load_state_dict(original: Callable) -> Callable:
    @wraps(original)
    def load_state_dict(module, state_dict, strict=False, logger=None):
        weights = match_names(module, state_dict)
        if _is_supported(module) and not strict:
            missing = _missing(module, weights)
            if missing and MISSING_REFUSED.get():
                raise CheckpointError(f'the checkpoint {missing}, so the model cannot predict')
            differences = [f'{missing}, which keep their values'] if missing else []
            own = _unwrap_model(module).state_dict()
            unused = [key for key in weights if key not in own]
            if unused:
                differences.append(f'has {len(unused)} tensors without use, such as {unused[-1]}')
            if differences:
                print_log(f'The checkpoint {"; it ".join(differences)}', logger or 'current', WARNING)
                logger = 'silent'  # MMEngine would list every key
        return original(module, weights, strict, logger)

    load_state_dict.extended = True
    return load_state_dict


def _extend_load_to_model(original: Callable) -> Callable:
    @wraps(original)
    def load_checkpoint_to_model(model, checkpoint, *args, **kwargs):
        result = original(model, checkpoint, *args, **kwargs)
        if isinstance(result, dict) and _is_supported(model):
            result.setdefault('meta', {})  # which MMSegmentation's init_model reads from every file
        return result

    return load_checkpoint_to_model


def _extend_call_hook(original: Callable) -> Callable:
    @wraps(original)
    def call_hook(runner, fn_name, **kwargs):
        if fn_name == 'after_load_checkpoint':  # before the hooks, which may copy the weights
            prepare_checkpoint(runner, kwargs['checkpoint'])
        return original(runner, fn_name, **kwargs)

    return call_hook


def load_from_local(filename: str, map_location: Any) -> Any:
    """Reads a local file without executing code: MMEngine's own with its meta data, of others the weights.

    Before PyTorch 2.6, files that hold more than tensors and plain values are read by MMEngine, which may execute code.
    """
    path = os.path.expanduser(filename)
    if not os.path.isfile(path):
        return mmengine_checkpoint.load_from_local(filename, map_location)  # raises its error
    if is_torch_file(path):
        with suppress(pickle.UnpicklingError):
            return torch.load(path, map_location, weights_only=True)
        if digit_version(torch.__version__) < digit_version('2.6.0'):
            return mmengine_checkpoint.load_from_local(filename, map_location)
    return dict(state_dict=load(path))


def load_from_http(filename: str, map_location: Any = None) -> Any:
    """Reads an address like a local file, after the first process of each node has downloaded it."""
    path = download_once_per_node(filename)
    if is_torch_file(path):
        return load_from_local(path, map_location)
    return dict(state_dict=load(filename))  # by its address, so that a page downloaded by mistake is deleted
