"""The command-line tools: short trainings as a user starts them, what needs no process of its own in this one."""

import json
import re
import runpy
import shutil
import sys
from importlib.metadata import packages_distributions

import matplotlib.pyplot as plt
import pytest
import timm
import torch
from forms import slim
from mmengine.config import Config

from mmvitzoo import get_config
from mmvitzoo.checkpoints import convert, load, save
from mmvitzoo.engine import launch
from mmvitzoo.inference import load_model

DETECTOR = 'configs/mpvit/mask-rcnn_mpvit-tiny_fpn_mini-coco.py'
SEGMENTOR = 'configs/vit/plainvit-mini_mln_upernet_mini-coco.py'
CLASSIFIER = 'configs/vit/plainvit-mini_mini-classes.py'
CONVERT = 'tools/model_converters/convert.py'
MMDET = packages_distributions()['mmdet'][0]  # mmdet, or onedl-mmdetection on the second stack
# Two iterations and two validation images.
SHORT = (
    '--cfg-options train_dataloader.dataset.indices=4 train_dataloader.batch_size=2 val_dataloader.dataset.indices=2 '
    'test_dataloader.dataset.indices=2 train_cfg.val_interval=1 default_hooks.logger.interval=1 '
)
SHORT_SEGMENTOR = '--cfg-options default_hooks.logger.interval=1 train_cfg.max_iters=2 val_dataloader.dataset.indices=2'


def losses(output):
    """The training losses in a log, in order."""
    return [float(x) for x in re.findall(r'(?:Epoch|Iter)\(train\).* loss: (\S+)', output)]


# ---------------------------------------------------------------- one short training through each toolbox


@pytest.fixture(scope='session')
def detector(run, workspace):
    """Folder and output of a training through `mim train mmdet`."""
    output = run(f'mim train {MMDET} {DETECTOR} --gpus 0 --work-dir work_dirs/detector {SHORT} train_cfg.max_epochs=1')
    return workspace / 'work_dirs/detector', output


@pytest.fixture(scope='session')
def classifier(run, workspace):
    """Checkpoint and output of a training of a classifier of MMPretrain."""
    output = run(
        f'python tools/train.py {CLASSIFIER} --work-dir work_dirs/classes --cfg-options train_cfg.max_epochs=1 '
        'train_cfg.val_interval=1 train_dataloader.dataset.indices=64 train_dataloader.batch_size=32 '
        'default_hooks.logger.interval=1'
    )
    return workspace / 'work_dirs/classes/epoch_1.pth', output


@pytest.mark.stack
def test_mim_trains_a_detector(detector, run_tool):
    """The training validates; the pictures of `make demo` are drawn from what it leaves."""
    folder, output = detector
    assert len(losses(output)) == 2 and 'coco/bbox_mAP' in output and 'coco/segm_mAP' in output
    checkpoint = (folder / 'last_checkpoint').read_text()
    assert checkpoint.endswith('epoch_1.pth')
    arguments = f'{DETECTOR} {checkpoint} --out p.png --num-images 3 --score-thr 0'
    run_tool(f'tools/visualization/predictions.py {arguments}')
    run_tool(f'tools/analysis_tools/curves.py {folder} --out c.png')
    compared = run_tool(f'tools/analysis_tools/curves.py {folder} {folder} --out c2.png')
    assert compared.count(f'{folder.name}: coco/bbox_mAP: ') == 2
    for name in ('p.png', 'c.png', 'c2.png'):
        picture = plt.imread(name)
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.05


@pytest.mark.slow
def test_mmdetections_tools_analyze_a_detector(detector, run, workspace):
    """The commands of docs/own_data.md on the confusion of classes."""
    folder, _ = detector
    results = 'out/results.pkl'
    options = '--cfg-options test_evaluator.classwise=True model.test_cfg.rcnn.score_thr=0.0'
    assert '| category | mAP' in run(f'python tools/test.py {DETECTOR} {folder}/epoch_1.pth --out {results} {options}')
    run(f'mim run mmdet confusion_matrix {DETECTOR} {results} out/confusion')
    run(f'mim run mmdet analyze_results {DETECTOR} {results} out/images --topk 2')
    assert plt.imread(workspace / 'out/confusion/confusion_matrix.png').std() > 0.05
    assert len(list((workspace / 'out/images/bad').glob('*.jpg'))) == 2


@pytest.mark.stack
def test_mim_trains_a_segmentor_through_this_package(run):
    """The base of its config is MMSegmentation's, which has another name on the second stack."""
    output = run(f'mim train mmvitzoo {SEGMENTOR} --gpus 0 --work-dir work_dirs/segmentor {SHORT_SEGMENTOR}')
    assert len(losses(output)) == 2 and 'mIoU' in output


@pytest.mark.stack
def test_script_trains_a_classifier(classifier):
    checkpoint, output = classifier
    assert len(losses(output)) == 2 and 'accuracy/top1' in output and checkpoint.exists()


@pytest.mark.slow
def test_mim_resumes_and_tests(detector, run, workspace):
    folder = workspace / 'work_dirs/resumed'
    shutil.copytree(detector[0], folder)
    command = f'mim train {MMDET} {DETECTOR} --gpus 0 --work-dir {folder} --resume'
    resumed = run(f'{command} {SHORT} train_cfg.max_epochs=2')
    assert 'resumed epoch: 1, iter: 2' in resumed and len(losses(resumed)) == 2
    tested = run(f'mim test {MMDET} {DETECTOR} --checkpoint {folder}/epoch_2.pth --gpus 0 {SHORT}')
    assert 'Load checkpoint from' in tested and 'coco/segm_mAP' in tested


@pytest.mark.slow
def test_pretrained_small_models(classifier, run):
    """The weights of a classifier, in timm's names, start a segmentor, which is tested, and a detector."""
    checkpoint, _ = classifier
    run(f'python {CONVERT} {checkpoint} checkpoints/plainvit_mini_timm.pth --to timm --force')
    config = 'configs/vit/plainvit-mini-pretrained_mln_upernet_mini-coco.py'
    output = run(f'python tools/train.py {config} --work-dir work_dirs/seg {SHORT_SEGMENTOR}')
    assert 'PlainViT: loaded 87 tensors' in output and 'weights are new' not in output and 'mIoU' in output
    output = run(f'python tools/test.py {config} work_dirs/seg/iter_2.pth {SHORT} test_dataloader.dataset.indices=2')
    assert 'mIoU' in output
    config = 'configs/vitdet/mask-rcnn_plainvit-mini-pretrained_mini-coco.py'
    output = run(f'python tools/train.py {config} --work-dir work_dirs/vitdet {SHORT} train_cfg.max_epochs=1')
    assert 'PlainViT: loaded 87 tensors' in output and 'weights are new' not in output
    assert len(losses(output)) == 2 and 'coco/segm_mAP' in output


@pytest.mark.slow
def test_two_processes_train_and_test_without_gpu(run):
    """SyncBN, which the COCO configs have, exists only on GPUs: each process normalises its batch."""
    options = f'{SHORT} train_cfg.max_epochs=1 model.backbone.norm_cfg.type=SyncBN'
    work_dir = '--work-dir work_dirs/two'
    output = run(f'tools/dist_train.sh {DETECTOR} 2 {work_dir} {options}', PORT='29511')
    assert 'processes use the gloo backend' in output and len(losses(output)) == 1
    output = run(f'tools/dist_test.sh {DETECTOR} work_dirs/two/epoch_1.pth 2 {work_dir} {options}', PORT='29512')
    assert 'coco/segm_mAP' in output


# ---------------------------------------------------------------- wrong use


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_wrong_use_of_train_and_test(run_tool, tmp_path, tool):
    assert f'usage: {tool}.py CONFIG' in run_tool(f'tools/{tool}.py', fails=True)
    assert f'usage: {tool}.py CONFIG' in run_tool(f'tools/{tool}.py --help')
    assert 'nowhere.py: no such config' in run_tool(f'tools/{tool}.py nowhere.py', fails=True)
    (tmp_path / 'config.py').write_text("default_scope = 'mmpose'")
    message = run_tool(f'tools/{tool}.py {tmp_path}/config.py', fails=True)
    assert "default_scope must be one of mmdet, mmseg, mmpretrain, got 'mmpose'" in message
    # The arguments are those of the config's toolbox.
    assert '--cfg-options' in run_tool(f'tools/{tool}.py {DETECTOR} -h')
    assert ('--no-validate' in run_tool(f'tools/{tool}.py {CLASSIFIER} -h')) == (tool == 'train')


@pytest.mark.parametrize(
    'toolbox, message', [('mmlost', 'mmlost is not installed: mim install mmlost'), ('timm', 'has no tools/train.py')]
)
def test_toolboxes_without_a_script(toolbox, message):
    with pytest.raises(SystemExit, match=message):
        launch._script(toolbox, 'train')


@pytest.mark.parametrize('tool', ['dist_train', 'dist_test', 'slurm_train', 'slurm_test'])
def test_shell_scripts_say_how_they_are_used(run, tool):
    assert f'usage: tools/{tool}.sh ' in run(f'tools/{tool}.sh', fails=True)


@pytest.mark.parametrize('tool, arguments', [('train', 'c.py dir'), ('test', 'c.py c.pth')])
def test_slurm(run, tmp_path, tool, arguments):
    """Arguments that the scripts pass to srun."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\necho srun "$@"\n')
    srun.chmod(0o755)
    env = dict(GPUS='16', GPUS_PER_NODE='4', SRUN_ARGS='--quiet --exclusive')
    output = run(f'env PATH={tmp_path}:/usr/bin:/bin tools/slurm_{tool}.sh part job {arguments} --amp', **env)
    for expected in (
        '-p part',
        '--job-name=job',
        '--gres=gpu:4',
        '--ntasks=16',
        '--quiet --exclusive',
        '--launcher=slurm --amp',
    ):
        assert expected in output


def test_convert_official_checkpoint(run_tool, workspace, load_golden):
    official = load_golden('mpvit_tiny_official').state_dict
    torch.save({'model': official}, workspace / 'mpvit_tiny.pth')
    command = f'{CONVERT} mpvit_tiny.pth out/mm.pth'
    output = run_tool(command)
    assert re.search(r'family +mpvit \(official layout\)\nvariant +tiny\n', output)
    assert re.search(r'tensors +551', output) and re.search(r'dropped +322: equal copy', output)
    written = load(workspace / 'out' / 'mm.pth')
    assert written.keys() == convert(official).state_dict.keys()
    assert 'out/mm.pth: exists already and is not overwritten; --force replaces it' in run_tool(command, fails=True)
    run_tool(f'{command} --force')


def test_convert_reports_errors_in_one_line(run_tool, workspace):
    (workspace / 'page.pth').write_text('<html>')
    torch.save({'conv.weight': torch.zeros(1)}, workspace / 'other.pth')
    torch.save(slim('mpvit').state_dict(), workspace / 'mpvit.pth')
    torch.save(slim('vit_rope').state_dict(), workspace / 'rope.pth')
    for arguments, message in (
        ('page.pth out/page.pth', 'page.pth: is neither'),
        ('other.pth out/page.pth', 'other.pth: the keys fit no layout'),
        ('nowhere.pth out/page.pth', 'nowhere.pth: no such checkpoint file'),
        ('mpvit.pth out/page.pth --to timm', 'mpvit.pth: no layout mpvit/timm; the layouts are'),
        ('rope.pth out/page.pth --to mmseg', 'rope.pth: mmseg has no rotary positions'),
    ):
        output = run_tool(f'{CONVERT} {arguments}', fails=True)
        assert output.count('\n') == 1 and message in output
    assert not (workspace / 'out' / 'page.pth').exists()


def test_make_mini_coco(run_tool, workspace):
    assert 'digits to train' in run_tool('tools/dataset_converters/make_mini_coco.py other/mini')
    assert (workspace / 'other/mini/annotations/instances_val.json').is_file()
    (workspace / 'taken').mkdir()
    assert 'choose another folder' in run_tool('tools/dataset_converters/make_mini_coco.py taken', fails=True)


def assert_equal(weights, expected):
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], value) for key, value in expected.items())


def test_convert_between_timm_and_other_packages(run_tool, workspace):
    torch.manual_seed(0)
    weights = timm.create_model('vit_tiny_patch16_224', num_classes=5).state_dict()
    save(weights, workspace / 'vit.safetensors', overwrite=True)
    output = run_tool(f'{CONVERT} vit.safetensors out/vit_mm.pth')
    assert re.search(r'family +plainvit \(timm layout\)', output)
    assert re.search(r'variant +tiny, num_heads=3 \(assumed\)', output)
    run_tool(f'{CONVERT} out/vit_mm.pth out/vit_timm.safetensors --to timm')
    assert_equal(load(workspace / 'out' / 'vit_timm.safetensors'), weights)

    run_tool(f'{CONVERT} out/vit_mm.pth out/vit_mmpretrain.pth --to mmpretrain')
    assert 'backbone.layers.11.ffn.layers.1.weight' in load(workspace / 'out' / 'vit_mmpretrain.pth')
    run_tool(f'{CONVERT} out/vit_mmpretrain.pth out/vit_timm2.pth --to timm')
    assert_equal(load(workspace / 'out' / 'vit_timm2.pth'), weights)


def test_convert_reads_an_entry_for_an_activation(tmp_path, monkeypatch, capsys):
    models = [slim('vit').state_dict(), slim('vit').state_dict()]
    models[1]['norm.weight'] = models[1]['norm.weight'] + 1
    model, average = (dict(model) for model in models)  # no metadata tell the activation
    torch.save(dict(model=model, model_ema=average), tmp_path / 'a.pth')
    files = [str(tmp_path / 'a.pth'), str(tmp_path / 'b.safetensors')]
    monkeypatch.setattr(sys, 'argv', [CONVERT, *files, '--key', 'model_ema', '--act', 'quick_gelu'])
    runpy.run_path(CONVERT, run_name='__main__')
    result = convert(load(files[1]))
    assert result.backbone_cfg['act'] == 'quick_gelu' and 'act' not in result.assumed
    assert_equal(result.backbone, average)
    assert 'tensors  ' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['vit_pe_spatial_tiny_patch16_512', 'vit_small_patch16_rope_mixed_ape_224'])
def test_convert_rotary_positions(run_tool, workspace, name):
    weights = timm.create_model(name, depth=1, embed_dim=64, num_heads=1, num_classes=0).state_dict()
    save(weights, workspace / 'rope.safetensors', overwrite=True)
    run_tool(f'{CONVERT} rope.safetensors out/{name}.pth')
    run_tool(f'{CONVERT} out/{name}.pth out/{name}_timm.pth --to timm')
    assert_equal(load(workspace / 'out' / f'{name}_timm.pth'), weights)


def test_convert_reports_dropped_weights(run_tool, workspace):
    distilled = timm.create_model('deit_tiny_distilled_patch16_224').state_dict()
    torch.save({'model': distilled}, workspace / 'distilled.pth')
    output = run_tool(f'{CONVERT} distilled.pth out/distilled.pth')
    assert re.search(r'dropped +3: PlainViT has no distillation token.*, such as (dist_token|head_dist)', output)
    segmentor = {f'backbone.{key}': x for key, x in slim('vit').state_dict().items()}
    segmentor['decode_head.conv_seg.weight'] = torch.zeros(1)
    torch.save({'state_dict': segmentor}, workspace / 'segmentor.pth')
    output = run_tool(f'{CONVERT} segmentor.pth out/from_segmentor.pth --to timm')
    assert re.search(r'dropped +1: has no place in the timm layout', output)


@pytest.mark.stack
def test_mmsegmentation_loads_what_vit2mmseg_writes(run_tool, workspace):
    from mmseg.models.backbones import VisionTransformer

    torch.manual_seed(0)
    weights = timm.create_model('deit_tiny_patch16_224').state_dict()
    torch.save({'model': weights}, workspace / 'deit.pth')
    output = run_tool('tools/model_converters/vit2mmseg.py deit.pth out/deit_mmseg.pth --force')
    assert re.search(r'dropped +2: has no place in the mmseg layout', output)
    checkpoint = str(workspace / 'out' / 'deit_mmseg.pth')
    model = VisionTransformer(
        embed_dims=192, num_layers=12, num_heads=3, final_norm=True, patch_bias=True, pretrained=checkpoint
    )
    model.init_weights()
    assert torch.equal(model.layers[7].ffn.layers[1].weight, weights['blocks.7.mlp.fc2.weight'])
    assert set(model.state_dict()) == set(load(checkpoint))


LORA = 'configs/vitdet/mask-rcnn_plainvit-mini-lora_mini-coco.py'


def test_merge_lora_writes_a_plain_checkpoint(run_tool, workspace):
    model = load_model(workspace / LORA)
    for name, value in model.named_parameters():
        if 'lora_up' in name:  # as if it was trained
            torch.nn.init.normal_(value, std=0.1)
    save(model.state_dict(), workspace / 'out/lora.pth')
    command = f'tools/merge_lora.py {LORA} out/lora.pth out/merged.pth'
    assert 'written  out/merged.pth: ' in run_tool(command)
    assert 'out/merged.pth: exists already and is not overwritten; --force replaces it' in run_tool(command, fails=True)
    plain_config = LORA.replace('-lora', '-pretrained')
    plain = load_model(workspace / plain_config, workspace / 'out/merged.pth')
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(plain.extract_feat(x), model.extract_feat(x)):
            assert (a - b).norm() <= 1e-6 * b.norm()
    message = run_tool(f'tools/merge_lora.py {plain_config} out/merged.pth out/other.pth', fails=True)
    assert message.endswith('LoRA: MaskRCNN has no low-rank updates to merge\n') and message.count('\n') == 1


NEW_STYLE_BASE = """
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize
from mmdet.evaluation import CocoMetric
from mmengine.hooks import CheckpointHook
from mmengine.optim import LinearLR, OptimWrapper
from mmengine.runner import EpochBasedTrainLoop
from torch.optim import AdamW

default_scope = None
pipeline = [
    dict(type=LoadImageFromFile),
    dict(type=Resize, scale=(96, 96)),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=PackDetInputs),
]
train_dataloader = dict(batch_size=2, dataset=dict(type=CocoDataset, pipeline=pipeline))
val_dataloader = test_dataloader = dict(batch_size=1, dataset=dict(type=CocoDataset, test_mode=True, pipeline=pipeline))
val_evaluator = test_evaluator = dict(type=CocoMetric, metric='bbox')
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=4, val_interval=1)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=1e-3))
param_scheduler = [dict(type=LinearLR, start_factor=0.01, by_epoch=False, begin=0, end=500)]
default_hooks = dict(checkpoint=dict(type=CheckpointHook, interval=1))
"""
NEW_STYLE = """
from mmdet.models import DetDataPreprocessor, L1Loss, RetinaHead, RetinaNet
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder
from mmengine.config import read_base

from mmvitzoo import PlainViT
from mmvitzoo.models import SimpleFeaturePyramid

with read_base():
    from .new_style_base import *

model = dict(
    type=RetinaNet,
    data_preprocessor=dict(type=DetDataPreprocessor),
    backbone=dict(type=PlainViT, arch=dict(embed_dims=48, num_layers=2, num_heads=3, mlp_ratio=2), img_size=64),
    neck=dict(type=SimpleFeaturePyramid, in_channels=48, out_channels=8),
    bbox_head=dict(
        type=RetinaHead,
        num_classes=2,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        anchor_generator=dict(type=AnchorGenerator, scales=[4], ratios=[1.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder),
        loss_bbox=dict(type=L1Loss),
    ),
)
"""


def test_configs_in_the_new_style(run_tool, workspace):
    """Types are classes, and ``default_scope`` is None: that of the model's class counts."""
    (workspace / 'new_style_base.py').write_text(NEW_STYLE_BASE)
    (workspace / 'new_style.py').write_text(NEW_STYLE)
    assert load_model(Config.fromfile(workspace / 'new_style.py')).cfg.default_scope == 'mmdet'
    costs = run_tool('tools/analysis_tools/get_flops.py new_style.py')
    assert 'image (H, W)             (96, 96)' in costs  # the scale of Resize
    assert '--auto-scale-lr' in run_tool('tools/train.py new_style.py -h')  # MMDetection's script
    # A file has names instead of classes.
    written = run_tool('tools/adapt_config.py new_style.py data/mini --out out/adapted.py --epochs 1 --overwrite')
    assert 'classes   10: 0, 1, 2' in written
    assert get_config(str(workspace / 'out/adapted.py')).param_scheduler[0]['end'] < 500
    run_tool('tools/analysis_tools/get_flops.py out/adapted.py --shape 96 96')


def test_benchmark(run_tool, workspace):
    script = 'tools/analysis_tools/benchmark.py'
    output = run_tool(f'{script} mvitv2-tiny --shape 1 64 64 --rounds 1 --threads 1 --optimize --json out/speed.json')
    assert re.search(r'timm mvitv2_tiny +[0-9.]+ s +[0-9.]+x +[0-9]+ MiB +[0-9.]+x', output)
    results = json.loads((workspace / 'out/speed.json').read_text())['mvitv2-tiny']
    assert len(results) == 4 and all(x['seconds'] > 0 for x in results.values())
    assert 'got x' in run_tool(f'{script} x', fails=True)
    assert '--fuse is for inference' in run_tool(f'{script} mpvit-small --fuse --train', fails=True)
    assert '--optimize is for inference on a CPU' in run_tool(f'{script} vit-base --optimize --train', fails=True)
    if not torch.cuda.is_available():
        assert 'torch finds no GPU' in run_tool(f'{script} mpvit-small --device cuda', fails=True)


@pytest.mark.slow
@pytest.mark.parametrize('options', ['--bf16 --channels-last', '--train'])
def test_benchmark_of_every_family(options, run, workspace):
    """Ours and their peers run; the chart is drawn."""
    cases = 'vit-base mvitv2-tiny mpvit-small scalablevit-small'
    chart = workspace / 'out' / 'chart.png'
    chart.unlink(missing_ok=True)
    options = f'--shape 1 224 224 --rounds 1 --threads 1 {options} --chart {chart}'
    output = run(f'python tools/analysis_tools/benchmark.py {cases} {options}')
    names = re.findall(r'^(\S+) +(\S.*?) +[0-9.]+ s', output, re.MULTILINE)
    assert len(names) == 2 + 4 + 2 + 2 and 'left out' not in output
    assert plt.imread(chart).shape[1] > 500
