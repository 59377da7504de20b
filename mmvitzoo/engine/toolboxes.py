"""Models by name in the toolboxes, and the errors of their layer decay and feature pyramid for backbones.

MMDetection, MMSegmentation and MMPretrain are optional and take seconds to import, so that this package never imports
them. Their classes are extended when somebody else imports them, before or after this package.
"""

import re
import sys
import warnings
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from mmengine.config import Config
from mmengine.fileio import load
from mmengine.infer import BaseInferencer
from mmengine.logging import print_log
from torch import nn

from .. import zoo
from ..checkpoints.loading import refuse_missing_weights
from ..models.backbones.base import Backbone

# Task of the models that MMEngine's inferencers run, by default scope.
INFERENCER_TASKS = {'mmdet': 'detection', 'mmseg': 'semantic-segmentation'}


def extend_toolboxes() -> None:
    """Extends the inferencers now, and each toolbox as soon as it is imported."""
    _extend_inferencers()
    call_when_imported(
        {
            'mmpretrain.apis.base': _extend_mmpretrain_inferencer,
            'mmpretrain.apis.model': _extend_model_hub,
            'mmdet.engine.optimizers.layer_decay_optimizer_constructor': _name_layer_decay_constructor,
            'mmdet.models.necks.fpn': _explain_missing_levels,
            'mmseg.models.necks.fpn': _explain_missing_levels,
            'mmseg.engine.optimizers.layer_decay_optimizer_constructor': _name_layer_decay_constructor,
        }
    )


class _CallbackFinder(MetaPathFinder):
    """Finder that calls a function with a module after the module has been executed."""

    def __init__(self, callbacks: Dict[str, Callable[[ModuleType], None]]):
        self.callbacks = callbacks

    def find_spec(self, name: str, path: Optional[Sequence[str]], target: Any = None) -> Optional[ModuleSpec]:
        spec = PathFinder.find_spec(name, path, target) if name in self.callbacks else None
        if spec is not None:
            exec_module = spec.loader.exec_module

            def exec_and_call(module: ModuleType) -> None:
                exec_module(module)
                self.callbacks[name](module)

            spec.loader.exec_module = exec_and_call
        return spec


def call_when_imported(callbacks: Dict[str, Callable[[ModuleType], None]]) -> None:
    """Calls functions with modules: at once for those already imported, for others at the end of their import.

    Python has no event for this. A finder at the start of ``sys.meta_path`` wraps the loaders of these modules.

    Args:
        callbacks: Functions by the full names of the modules, which are submodules of packages.
    """
    for name, callback in callbacks.items():
        if name in sys.modules:
            callback(sys.modules[name])
    sys.meta_path.insert(0, _CallbackFinder(callbacks))


def _published_weights(name: str) -> Tuple[Optional[str], str]:
    """Returns the address of the weights of a config, or None, and the text of its metafile about weights."""
    metafile = zoo.config_files()[name].parent / 'metafile.yml'
    text = next(
        model.get('Weights', 'none are published') for model in load(metafile)['Models'] if model['Name'] == name
    )
    return (text if '://' in text else None), text


def _extend_inferencers() -> None:
    """Lets ``DetInferencer`` and ``MMSegInferencer`` take names of this package."""
    init, list_models = BaseInferencer.__init__, BaseInferencer.list_models
    load_model = BaseInferencer._load_model_from_metafile

    def names(scope: Optional[str]) -> List[str]:
        return zoo.list_models(task=INFERENCER_TASKS[scope]) if scope in INFERENCER_TASKS else []

    @wraps(init)
    def init_with_weights(self: BaseInferencer, model: Any = None, weights: Any = None, *args: Any, **kwargs: Any):
        self._has_weights = weights is not None  # _load_model_from_metafile is not told
        with refuse_missing_weights():
            init(self, model, weights, *args, **kwargs)

    @wraps(list_models)
    def list_all_models(scope: Optional[str] = None, patterns: str = '.*') -> List[str]:
        ours = [name for name in names(scope) if re.match(patterns, name)]
        found = list_models(scope, patterns)
        print_log(''.join(f'model_name: {name}\n' for name in ours), logger='current')
        return found + ours

    @wraps(load_model)
    def load_model_by_name(self: BaseInferencer, model: str) -> Tuple[Config, Optional[str]]:
        name, ours = model.lower(), names(self.scope)
        if name in ours:
            address, text = _published_weights(name)
            if address is None and not self._has_weights:
                message = f'{name} has random weights: {text}. To load a checkpoint, pass weights=FILE'
                warnings.warn(message, stacklevel=5)  # the caller of the inferencer
            return zoo.get_config(name), address
        try:
            return load_model(self, model)
        except ValueError as error:
            if not str(error).startswith('Cannot find model'):
                raise
            models = self._get_models_from_metafile(self._get_repo_or_mim_dir(self.scope))
            similar = zoo.similar_names(name, [*ours, *(model['Name'] for model in models)])
            raise ValueError(f'{error}{similar}') from None

    BaseInferencer.__init__ = init_with_weights
    BaseInferencer.list_models = staticmethod(list_all_models)
    BaseInferencer._load_model_from_metafile = load_model_by_name


def _extend_mmpretrain_inferencer(module: ModuleType) -> None:
    """Lets MMPretrain's inferencers, which are none of MMEngine's, refuse checkpoints that lack weights."""
    inferencer = module.BaseInferencer
    init = inferencer.__init__

    @wraps(init)
    def init_with_all_weights(*args: Any, **kwargs: Any) -> None:
        with refuse_missing_weights():
            init(*args, **kwargs)

    inferencer.__init__ = init_with_all_weights


def _extend_model_hub(module: ModuleType) -> None:
    """Registers the classifiers of this package in MMPretrain's ``ModelHub``."""
    from modelindex.models.Result import Result  # a requirement of MMPretrain

    hub = module.ModelHub
    get, names = hub.get.__func__, zoo.list_models(task='classification')
    if not names or hub.has(names[0]):
        return
    others = set(hub._models_dict)
    hub.register_model_index(zoo.root() / 'model-index.yml', zoo.root())
    for name in set(hub._models_dict) - others:
        model = hub._models_dict[name]
        if name not in names:
            del hub._models_dict[name]  # detectors and segmentors, which MMPretrain cannot build
            continue
        if '://' not in (model.weights or ''):
            model.weights = None  # MMPretrain warns and keeps random weights instead of opening the text as a file
        if not model.results:  # inference_model and list_models read the task from the results
            model.results = [Result(task='Image Classification', dataset=None, metrics={})]

    @wraps(get)
    def get_or_suggest(cls: type, model_name: str) -> Any:
        try:
            return get(cls, model_name)
        except ValueError as error:
            if not str(error).startswith('Failed to find model'):
                raise
            similar = zoo.similar_names(model_name.lower(), cls._models_dict)
            raise ValueError(f'{str(error).rstrip(".")}{similar}') from None

    hub.get = classmethod(get_or_suggest)


def _name_layer_decay_constructor(module: ModuleType) -> None:
    """Replaces the NotImplementedError without a text that these constructors raise for unknown backbones."""
    constructor = module.LearningRateDecayOptimizerConstructor
    add_params = constructor.add_params

    @wraps(add_params)
    def add_params_or_explain(self: Any, params: List[dict], module: nn.Module, **kwargs: Any) -> None:
        backbone = getattr(module, 'backbone', None)
        if isinstance(backbone, Backbone):
            raise NotImplementedError(
                f'{type(self).__name__} does not support {type(backbone).__name__}; use '
                f"constructor='BackboneLayerDecay' with "
                f'paramwise_cfg=dict(layer_decay_rate={self.paramwise_cfg.get("decay_rate", 0.7)}) and add '
                "'mmvitzoo.engine.layer_decay' to custom_imports (requires MMPretrain)"
            )
        add_params(self, params, module, **kwargs)

    constructor.add_params = add_params_or_explain


def _explain_missing_levels(module: ModuleType) -> None:
    """Replaces the AssertionError without a text that ``FPN`` raises for another number of maps."""
    fpn = module.FPN
    forward = fpn.forward

    @wraps(forward)
    def forward_or_explain(self: nn.Module, inputs: Sequence[Any]) -> Any:
        if len(inputs) != len(self.in_channels):
            raise ValueError(
                f'FPN: in_channels has {len(self.in_channels)} numbers, the backbone returns {len(inputs)} maps; a '
                "plain backbone needs neck=dict(type='SimpleFeaturePyramid', in_channels=WIDTH)"
            )
        return forward(self, inputs)

    fpn.forward = forward_or_explain
