"""Models by name in the toolboxes' own functions, and the error of their constructors for layer decay."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import mmengine.runner
import numpy as np
import pytest
from mmengine.infer import BaseInferencer
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn

import mmvitzoo
from mmvitzoo.engine.toolboxes import call_when_imported
from mmvitzoo.models import MPViT

pytestmark = pytest.mark.stack

ROOT = Path(__file__).resolve().parents[2]
DETECTOR = 'mask-rcnn_plainvit-mini_mini-coco'
SEGMENTOR = 'plainvit-mini_mln_upernet_mini-coco'
CLASSIFIER = 'plainvit-mini_mini-classes'
IMAGE = np.zeros((64, 64, 3), np.uint8)


def python(code, folder):
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.run([sys.executable, '-c', code], cwd=folder, env=env, capture_output=True, text=True)


# ---------------------------------------------------------------- imports


def test_import_leaves_toolboxes_alone(tmp_path):
    code = "import sys, mmvitzoo; print(sorted({'mmdet', 'mmseg', 'mmpretrain', 'modelindex'} & set(sys.modules)))"
    done = python(code, tmp_path)
    assert done.stdout.strip() == '[]', done.stderr


@pytest.mark.parametrize('first', ['mmvitzoo', 'toolboxes'])
def test_names_and_layer_decay_in_any_import_order(tmp_path, first):
    imports = [
        'import mmvitzoo',
        'import mmdet.apis, mmseg.apis, mmpretrain, mmdet.engine.optimizers, mmseg.engine.optimizers',
    ]
    imports = '\n'.join(imports if first == 'mmvitzoo' else reversed(imports))
    code = f"""
{imports}
from types import SimpleNamespace
from mmpretrain.apis import ModelHub
assert ModelHub.has({CLASSIFIER!r})
assert ModelHub.get({CLASSIFIER!r}).config.model.backbone.type == 'PlainViT'
assert {DETECTOR!r} in mmdet.apis.DetInferencer.list_models('mmdet')
assert {SEGMENTOR!r} in mmseg.apis.MMSegInferencer.list_models('mmseg')
backbone = mmvitzoo.models.PlainViT('tiny')
for toolbox in (mmdet, mmseg):
    constructor = toolbox.engine.optimizers.LearningRateDecayOptimizerConstructor
    try:
        constructor.add_params(SimpleNamespace(paramwise_cfg={{}}), [], SimpleNamespace(backbone=backbone))
        raise AssertionError
    except NotImplementedError as error:
        assert 'BackboneLayerDecay' in str(error)
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_callbacks_run_after_the_module(tmp_path, monkeypatch):
    (tmp_path / 'package_of_test').mkdir()
    (tmp_path / 'package_of_test' / '__init__.py').touch()
    (tmp_path / 'package_of_test' / 'module.py').write_text('value = 1')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, 'meta_path', list(sys.meta_path))
    values = []
    names = ['package_of_test.module', 'package_of_test.missing']
    call_when_imported({name: lambda module: values.append(module.value) for name in names})
    with pytest.raises(ModuleNotFoundError, match="^No module named 'package_of_test.missing'$"):
        __import__('package_of_test.missing')
    assert not values
    __import__('package_of_test.module')
    __import__('package_of_test.module')
    assert values == [1]
    imported = ModuleType('package_of_test.imported')
    monkeypatch.setitem(sys.modules, imported.__name__, imported)
    call_when_imported({imported.__name__: values.append})
    assert values == [1, imported]


# ---------------------------------------------------------------- MMPretrain


def test_mmpretrain_lists_classifiers_only():
    import mmpretrain

    names = mmpretrain.list_models('*mpvit*')
    assert names == mmvitzoo.list_models('mpvit', 'classification')
    ours, all_names = mmvitzoo.list_models(), mmpretrain.list_models()
    assert set(ours) & set(all_names) == set(mmvitzoo.list_models(task='classification'))
    assert 'resnet50_8xb32_in1k' in all_names and mmpretrain.ModelHub.has(names[0])
    assert names[0] in mmpretrain.list_models(task='Image Classification')


def test_get_model_builds_classifier_by_name():
    from mmpretrain import get_model

    model = get_model(CLASSIFIER.upper(), head=dict(num_classes=3))
    assert model.backbone.family == 'plainvit' and model.head.num_classes == 3


def test_get_model_loads_weights_of_metafile(monkeypatch):
    from mmpretrain import get_model

    loaded = []
    monkeypatch.setattr(mmengine.runner, 'load_checkpoint', lambda model, path, **kwargs: loaded.append(path) or {})
    get_model('mvitv2-tiny_8xb256_in1k', pretrained=True)
    assert loaded == ['https://dl.fbaipublicfiles.com/mvit/mvitv2_models/MViTv2_T_in1k.pyth']


def test_image_classification_inferencer_by_name_without_published_weights():
    from mmpretrain import ImageClassificationInferencer

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        with pytest.warns(UserWarning, match='^Unable to find pre-defined checkpoint of the model'):
            inferencer = ImageClassificationInferencer(CLASSIFIER, device='cpu')
        (prediction,) = inferencer(IMAGE)
    assert len(prediction['pred_scores']) == inferencer.model.head.num_classes


@pytest.mark.parametrize('name', [CLASSIFIER, 'plainvit-tiny_in1k'])
def test_task_of_classifiers_without_published_results(name):
    from mmpretrain import ModelHub

    assert [result.task for result in ModelHub.get(name).results] == ['Image Classification']


def test_inference_model_finds_the_task():
    from mmpretrain import get_model, inference_model

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        assert 'pred_scores' in inference_model(get_model(CLASSIFIER), IMAGE)


def test_model_hub_suggests_names():
    from mmpretrain import get_model

    with pytest.raises(ValueError, match='^Failed to find model "mpvit-tyny_8xb128_in1k".*mpvit-tiny_8xb128_in1k'):
        get_model('mpvit-tyny_8xb128_in1k')


# ---------------------------------------------------------------- MMDetection and MMSegmentation


def inferencer_class(scope):
    if scope == 'mmdet':
        from mmdet.apis import DetInferencer

        return DetInferencer
    from mmseg.apis import MMSegInferencer

    return MMSegInferencer


@pytest.fixture
def built(monkeypatch):
    """Lists the names of configs and the weights that inferencers were to load, without building models."""
    built = []

    def init_model(self, cfg, weights, device):
        built.append((Path(cfg.filename).stem, weights))
        raise InterruptedError

    monkeypatch.setattr(BaseInferencer, '_init_model', init_model)
    return built


@pytest.mark.parametrize('scope, name', [('mmdet', DETECTOR), ('mmseg', SEGMENTOR)])
def test_inferencer_by_name_predicts(scope, name):
    """Without published weights it is random, and a warning says why."""
    text = f'^{name} has random weights: there are none; train this config. To load a checkpoint, pass weights=FILE$'
    with pytest.warns(UserWarning, match=text):
        inferencer = inferencer_class(scope)(name, device='cpu')
    assert inferencer.model.backbone.family == 'plainvit' and len(inferencer(IMAGE)['predictions']) > 0


@pytest.mark.parametrize(
    'scope, name, weights',
    [
        (
            'mmdet',
            'mask-rcnn_plainvit-base-mae_lsj-100e_coco',
            'https://dl.fbaipublicfiles.com/detectron2/ViTDet/COCO/mask_rcnn_vitdet_b/f325346929/model_final_61ccd1.pkl',
        ),
        (
            'mmseg',
            'deit-small_upernet_8xb2-160k_ade20k-512x512',
            'https://download.openmmlab.com/mmsegmentation/v0.5/vit/upernet_deit-s16_512x512_160k_ade20k/'
            'upernet_deit-s16_512x512_160k_ade20k_20210621_160903-5110d916.pth',
        ),
    ],
)
def test_inferencer_loads_weights_of_metafile(scope, name, weights, built):
    for given in ({}, dict(weights='mine.pth')):
        with pytest.raises(InterruptedError):
            inferencer_class(scope)(name, device='cpu', **given)
    assert built == [(name, weights), (name, 'mine.pth')]


@pytest.mark.parametrize('scope, name', [('mmdet', DETECTOR), ('mmseg', SEGMENTOR)])
def test_inferencer_with_given_weights_does_not_warn(scope, name, built):
    with warnings.catch_warnings(), pytest.raises(InterruptedError):
        warnings.simplefilter('error', UserWarning)
        inferencer_class(scope)(name.upper(), 'mine.pth', device='cpu')
    assert built == [(name, 'mine.pth')]


@pytest.mark.parametrize('scope, task', [('mmdet', 'detection'), ('mmseg', 'semantic-segmentation')])
def test_inferencers_list_models_of_their_task(scope, task):
    found = inferencer_class(scope).list_models(scope)
    ours = mmvitzoo.list_models(task=task)
    assert found[-len(ours) :] == ours and len(found) > len(ours)
    assert not set(found[: -len(ours)]) & set(mmvitzoo.list_models())
    assert inferencer_class(scope).list_models(scope, '.*mpvit-base_upernet') == (
        ['mpvit-base_upernet_8xb2-160k_ade20k-512x512'] if scope == 'mmseg' else []
    )


def test_inferencer_loads_stock_models(built):
    with pytest.raises(InterruptedError):
        inferencer_class('mmdet')('faster-rcnn_r50_fpn_1x_coco', device='cpu')
    ((name, weights),) = built
    assert name == 'faster-rcnn_r50_fpn_1x_coco' and weights.startswith('https://')


@pytest.mark.parametrize(
    'scope, name, suggested',
    [
        ('mmdet', 'mask-rcnn_mpvit-tyny_fpn_1x_coco', 'mask-rcnn_mpvit-tiny_fpn_1x_coco'),
        ('mmdet', 'faster-rcnn_r50_fpn_1x_coko', 'faster-rcnn_r50_fpn_1x_coco'),
        ('mmseg', 'mpvit-base_upernet_8xb2-160k_ade20k-512x51', 'mpvit-base_upernet_8xb2-160k_ade20k-512x512'),
    ],
)
def test_inferencer_suggests_names(scope, name, suggested):
    with pytest.raises(ValueError, match=f'^Cannot find model: {name} in {scope}; did you mean {suggested} or'):
        inferencer_class(scope)(name, device='cpu')


# ---------------------------------------------------------------- layer decay


class Detector(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


class ConvNeXt(nn.Module):
    """Backbone with the class name and parameter names that the stock constructors know."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)])])


def build_optimizer(scope, backbone, decay_type):
    __import__(f'{scope}.engine.optimizers')
    with DefaultScope.overwrite_default_scope(scope):
        return build_optim_wrapper(
            Detector(backbone),
            dict(
                type='OptimWrapper',
                optimizer=dict(type='AdamW', lr=1.0),
                constructor='LearningRateDecayOptimizerConstructor',
                paramwise_cfg=dict(decay_rate=0.8, decay_type=decay_type, num_layers=6),
            ),
        )


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
def test_stock_layer_decay_names_the_constructor_for_backbones_of_this_package(scope, decay_type):
    arch = dict(num_paths=(1, 2, 2, 2), num_layers=(1, 1, 1, 1), embed_dims=(16, 24, 32, 40), mlp_ratios=(2, 2, 2, 2))
    message = (
        "LearningRateDecayOptimizerConstructor does not support MPViT; use constructor='BackboneLayerDecay' with "
        "paramwise_cfg=dict(layer_decay_rate=0.8) and add 'mmvitzoo.engine.layer_decay' to custom_imports "
        '(requires MMPretrain)'
    )
    with pytest.raises(NotImplementedError) as error:
        build_optimizer(scope, MPViT(arch), decay_type)
    assert str(error.value) == message


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_stock_layer_decay_of_other_backbones_is_unchanged(scope):
    groups = build_optimizer(scope, ConvNeXt(), 'layer_wise').param_groups
    assert [group['lr'] for group in groups if 'lr_scale' in group] == [pytest.approx(0.8**6)] * 2
    with pytest.raises(NotImplementedError, match='^$'):
        build_optimizer(scope, nn.Linear(2, 2), 'layer_wise')
