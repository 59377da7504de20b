"""Authors' checkpoints through every function and tool that loads one into a whole model."""

import re
import sys
from importlib.metadata import packages_distributions

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner import Runner

from mmvitzoo import get_config
from mmvitzoo.checkpoints import CheckpointError, export

DETECTOR = 'retinanet_mpvit-tiny_fpn_1x_coco'
# Two small images; the memory of full ones is 3 GB.
SHORT = (
    '--cfg-options test_dataloader.dataset.indices=2 val_dataloader.dataset.indices=2 '
    'test_dataloader.dataset.pipeline.1.scale=(160,160) val_dataloader.dataset.pipeline.1.scale=(160,160) '
)
SEGMENTOR = 'plainvit-mini_mln_upernet_mini-coco'
CLASSIFIERS = {'official MPViT': 'mpvit-tiny_8xb128_in1k', 'timm ViT': 'plainvit-tiny_in1k'}


def config_of(name):
    config = get_config(name)
    config.model.backbone.pop('init_cfg', None)
    if name == SEGMENTOR:
        config.model.backbone.update(use_rel_pos=False)  # MMSegmentation has no names for relative positions
    return config


def build(name):
    config = config_of(name)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Writes checkpoints in the names of their authors; returns the file and our weights by kind."""
    folder, files = tmp_path_factory.mktemp('authors'), {}

    def write(kind, ours, theirs):
        files[kind] = (str(folder / f'{len(files)}.pth'), ours)
        torch.save({'model': theirs, 'iteration': 7}, files[kind][0])

    ours = build(DETECTOR).state_dict()
    write('detector', ours, {**export(ours, 'mpvit', 'detectron2'), 'pixel_mean': torch.zeros(3, 1, 1)})
    ours = build(SEGMENTOR).state_dict()
    backbone = export({key: ours[key] for key in ours if key.startswith('backbone.')}, 'plainvit', 'mmseg')
    theirs = {f'backbone.{key}': value for key, value in backbone.items()}
    write('segmentor', ours, {**theirs, **{key: ours[key] for key in ours if not key.startswith('backbone.')}})
    for kind, source in (('official MPViT', ('mpvit', 'official')), ('timm ViT', ('plainvit', 'timm'))):
        ours = build(CLASSIFIERS[kind]).state_dict()
        write(kind, ours, export(ours, *source))
    return files


def assert_equal(model, ours, prefix=''):
    loaded = {key: value for key, value in model.state_dict().items() if key.startswith(prefix)}
    assert loaded
    for key, value in loaded.items():
        torch.testing.assert_close(value, ours[key], rtol=0, atol=0, msg=key)


@pytest.mark.stack
def test_init_detector(files):
    from mmdet.apis import init_detector

    file, ours = files['detector']
    assert_equal(init_detector(get_config(DETECTOR), file, device='cpu', palette='random'), ours)


@pytest.mark.stack
def test_det_inferencer(files):
    from mmdet.apis import DetInferencer

    file, ours = files['detector']
    config = get_config(DETECTOR)
    assert_equal(DetInferencer(config.filename, file, device='cpu', palette='random', show_progress=False).model, ours)


@pytest.mark.stack
def test_init_segmentor(files):
    from mmseg.apis import init_model

    file, ours = files['segmentor']
    assert_equal(init_model(config_of(SEGMENTOR), file, device='cpu'), ours)


@pytest.mark.stack
def test_seg_inferencer(files):
    from mmseg.apis import MMSegInferencer

    file, ours = files['segmentor']
    assert_equal(MMSegInferencer(config_of(SEGMENTOR), file, device='cpu').model, ours)


@pytest.mark.stack
@pytest.mark.parametrize('kind', list(CLASSIFIERS))
def test_classification_inferencer(files, kind):
    from mmpretrain import ImageClassificationInferencer

    file, ours = files[kind]
    config = get_config(CLASSIFIERS[kind]).filename
    init_default_scope('mmpretrain')  # the inferencers of other toolboxes leave theirs
    assert_equal(ImageClassificationInferencer(config, pretrained=file, device='cpu').model, ours)


def load_in_runner(config, monkeypatch, tmp_path, mode, file, resume=False):
    """Builds a Runner and runs its train, val or test method up to the first iteration; returns its model."""
    config = config_of(config)
    config.merge_from_dict(dict(load_from=file, resume=resume, work_dir=str(tmp_path)))
    runner = Runner.from_cfg(config)
    for loop in ('EpochBasedTrainLoop', 'IterBasedTrainLoop', 'ValLoop', 'TestLoop'):
        monkeypatch.setattr(f'mmengine.runner.{loop}.run', lambda self: None)
    getattr(runner, mode)()
    return runner.model


@pytest.mark.stack
@pytest.mark.parametrize('mode', ['train', 'val', 'test'])
def test_runner_loads_detector(files, mock_datasets, monkeypatch, tmp_path, mode):
    monkeypatch.chdir(mock_datasets)
    file, ours = files['detector']
    assert_equal(load_in_runner(DETECTOR, monkeypatch, tmp_path, mode, file), ours)


def test_runner_trains_detector_from_classifier(files, mock_datasets, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(mock_datasets)
    file, ours = files['official MPViT']
    model = load_in_runner(DETECTOR, monkeypatch, tmp_path, 'train', file)
    assert_equal(model, ours, 'backbone.')
    (warning,) = (x for x in ''.join(capfd.readouterr()).splitlines() if 'The checkpoint lacks ' in x)
    assert re.search(r'lacks \d+ weights of RetinaNet, such as bbox_head.*, which keep their values; it has 2', warning)


def test_runner_loads_moving_average(files, mock_datasets, monkeypatch, tmp_path):
    """MMEngine's hook copies the weights of the file before the model gets them."""
    monkeypatch.chdir(mock_datasets)
    file, ours = files['detector']
    config = config_of(DETECTOR)
    config.merge_from_dict(dict(load_from=file, work_dir=str(tmp_path), custom_hooks=[dict(type='EMAHook')]))
    runner = Runner.from_cfg(config)
    monkeypatch.setattr('mmengine.runner.IterBasedTrainLoop.run', lambda self: None)
    runner.train()
    (hook,) = (hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook')
    assert_equal(hook.ema_model.module, ours)


def test_foreign_file_is_not_resumed(files, mock_datasets, monkeypatch, tmp_path):
    monkeypatch.chdir(mock_datasets)
    with pytest.raises(CheckpointError, match='no training can resume from it; use load_from'):
        load_in_runner(DETECTOR, monkeypatch, tmp_path, 'train', files['detector'][0], resume=True)


@pytest.mark.parametrize('mode', ['val', 'test'])
def test_classifier_is_not_evaluated_as_detector(files, mock_datasets, monkeypatch, tmp_path, mode):
    monkeypatch.chdir(mock_datasets)
    with pytest.raises(CheckpointError, match=r'lacks \d+ weights of RetinaNet, such as bbox_head.* be evaluated'):
        load_in_runner(DETECTOR, monkeypatch, tmp_path, mode, files['official MPViT'][0])


def test_runner_loads_bare_state_dict(files, mock_datasets, monkeypatch, tmp_path):
    monkeypatch.chdir(mock_datasets)
    _, ours = files['detector']
    torch.save(ours, tmp_path / 'a.pth')
    assert_equal(load_in_runner(DETECTOR, monkeypatch, tmp_path, 'test', str(tmp_path / 'a.pth')), ours)


def test_incomplete_file_is_not_evaluated(files, mock_datasets, monkeypatch, tmp_path):
    monkeypatch.chdir(mock_datasets)
    weights = {key: value for key, value in files['detector'][1].items() if not key.startswith('backbone.stages.1.')}
    key = 'bbox_head.retina_cls.bias'
    other_classes = {**files['detector'][1], key: torch.zeros(9)}
    for content, match in ((weights, r'lacks \d+ .* backbone.stages.1'), (other_classes, f'lacks 1 .* {key} of shape')):
        torch.save(dict(state_dict=content), tmp_path / 'a.pth')
        with pytest.raises(CheckpointError, match=match):
            load_in_runner(DETECTOR, monkeypatch, tmp_path, 'test', str(tmp_path / 'a.pth'))


@pytest.fixture(scope='module')
def incomplete(files, tmp_path_factory):
    """Writes checkpoints of a detector and a classifier that lack the last layer, or have it for other classes."""
    folder = tmp_path_factory.mktemp('incomplete')
    detector = {key: x for key, x in files['detector'][1].items() if not key.startswith('bbox_head.retina_cls')}
    torch.save(dict(state_dict=detector), folder / 'detector.pth')
    _, classifier = files['timm ViT']
    torch.save(dict(state_dict={**classifier, 'head.fc.bias': torch.zeros(3)}), folder / 'classifier.pth')
    return folder


@pytest.mark.stack
def test_inferencers_refuse_incomplete_files(incomplete):
    from mmdet.apis import DetInferencer
    from mmpretrain import ImageClassificationInferencer

    with pytest.raises(CheckpointError, match=r'the checkpoint lacks 2 weights of RetinaNet, such as bbox'):
        DetInferencer(get_config(DETECTOR).filename, str(incomplete / 'detector.pth'), device='cpu')
    init_default_scope('mmpretrain')
    config, file = get_config(CLASSIFIERS['timm ViT']).filename, str(incomplete / 'classifier.pth')
    with pytest.raises(CheckpointError, match=r'such as head.fc.bias of shape \(1000,\), there \(3,\), so the model'):
        ImageClassificationInferencer(config, pretrained=file, device='cpu')


@pytest.mark.stack
def test_init_detector_counts_missing_weights_in_one_line(incomplete, monkeypatch, capfd):
    from mmdet.apis import init_detector

    messages = []
    monkeypatch.setattr('mmvitzoo.checkpoints.loading.print_log', lambda message, *args: messages.append(message))
    init_detector(get_config(DETECTOR), str(incomplete / 'detector.pth'), device='cpu', palette='random')
    (message,) = messages
    assert message.startswith('The checkpoint lacks 2 weights of RetinaNet, such as bbox_head.retina_cls')
    output = ''.join(capfd.readouterr())
    assert 'missing keys' not in output and 'Loads checkpoint by local backend from path' in output


def test_tool_stops_with_one_line(files, mock_datasets, run_tool, tmp_path):
    output = run_tool(f'tools/test.py configs/mpvit/{DETECTOR}.py {files["timm ViT"][0]} --work-dir {tmp_path}', True)
    assert output.splitlines()[-1].startswith(
        f'{files["timm ViT"][0]}: the keys fit no mpvit/* layout, but plainvit/timm'
    )


def test_tool_evaluates_authors_detector(files, mock_datasets, run_tool, tmp_path):
    """One prediction per entry point is proved above; this is the command of the README."""
    options = f'{SHORT} test_dataloader.num_workers=0 test_dataloader.persistent_workers=False'
    command = f'tools/test.py configs/mpvit/{DETECTOR}.py {files["detector"][0]} --work-dir {tmp_path}'
    assert 'Converted the checkpoint from the mpvit/detectron2 layout' in run_tool(f'{command} {options}')


@pytest.mark.slow
def test_mim_tests_and_trains_authors_detector(files, mock_datasets, run, tmp_path):
    """Through custom_imports alone, without the tools of this package."""
    mim = f'{{}} {packages_distributions()["mmdet"][0]} configs/mpvit/{DETECTOR}.py --gpus 0 --work-dir {tmp_path}'
    file, _ = files['detector']
    tested = run(f'mim {mim.format("test")} --checkpoint {file} {SHORT}')
    assert 'Converted the checkpoint from the mpvit/detectron2 layout' in tested
    options = (
        f'{SHORT} train_cfg.max_iters=1 train_dataloader.batch_size=1 train_dataloader.dataset.indices=2 '
        'train_dataloader.dataset.pipeline.2.scale=(160,160) model.backbone.init_cfg=None'
    )
    file, _ = files['official MPViT']
    trained = run(f'mim {mim.format("train")} {options} load_from={file}')
    assert 'Converted the checkpoint from the mpvit/official layout' in trained


def test_tool_names_missing_pretrained_weights_before_it_trains(workspace, run_tool, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmengine.runner', None)  # nothing is built
    output = run_tool(
        f'tools/train.py configs/mpvit/{DETECTOR}.py --cfg-options model.backbone.init_cfg.checkpoint=nowhere.pth', True
    )
    assert output.splitlines()[-1].startswith('nowhere.pth: no such checkpoint file. The README beside the config')


def test_weights_of_another_variant_are_an_error(tmp_path):
    from mmdet.apis import init_detector

    model = build('retinanet_mpvit-xsmall_fpn_1x_coco')
    torch.save(model.state_dict(), tmp_path / 'xsmall.pth')
    with pytest.raises(CheckpointError, match=r'only \d+ of the \d+ tensors of RetinaNet are in the checkpoint'):
        init_detector(get_config(DETECTOR), str(tmp_path / 'xsmall.pth'), device='cpu', palette='random')


@pytest.mark.parametrize('prefix', ['_orig_mod.', 'module.', 'module._orig_mod.', '_fsdp_wrapped_module.'])
def test_weights_of_wrapped_models(tmp_path, prefix):
    from mmpretrain import get_model

    model = build('plainvit-mini_mini-classes')
    torch.save({'state_dict': {prefix + key: value for key, value in model.state_dict().items()}}, tmp_path / 'a.pth')
    config = Config(dict(model=get_config('plainvit-mini_mini-classes').model, default_scope='mmpretrain'))
    assert_equal(get_model(config, pretrained=str(tmp_path / 'a.pth')), model.state_dict())


def test_stock_models_load_as_before(tmp_path):
    """A model without a backbone of this package may have any names, and lack any weights."""
    from mmengine.runner.checkpoint import load_checkpoint

    model = torch.nn.Linear(2, 3)
    torch.save({'weight': torch.ones(3, 2), 'other': torch.ones(1)}, tmp_path / 'a.pth')
    load_checkpoint(model, str(tmp_path / 'a.pth'))
    assert (model.weight == 1).all()
