"""The command-line tools, run as a user runs them."""

import json
import re
from importlib.metadata import packages_distributions

import matplotlib.pyplot as plt
import pytest
import timm
import torch

from mmvitzoo.checkpoints import convert, load, save
from mmvitzoo.engine import launch

MINI_CONFIG = 'configs/mpvit/mask-rcnn_mpvit-tiny_fpn_mini-coco.py'
MMDET = packages_distributions()['mmdet'][0]  # mmdet, or onedl-mmdetection on the second stack
# Two iterations and two validation images.
SHORT = (
    '--cfg-options train_dataloader.dataset.indices=4 val_dataloader.dataset.indices=2 '
    'test_dataloader.dataset.indices=2 train_cfg.val_interval=1 default_hooks.logger.interval=1 '
)


def losses(output):
    """The training losses in a log, in order."""
    return [float(x) for x in re.findall(r'Epoch\(train\).* loss: (\S+)', output)]


@pytest.mark.stack
def test_mim_trains_resumes_and_tests(run, workspace):
    command = f'mim train {MMDET} {MINI_CONFIG} --gpus 0 --work-dir work_dirs/end-to-end'
    first = run(f'{command} {SHORT} train_cfg.max_epochs=1')
    assert len(losses(first)) == 2 and 'coco/bbox_mAP' in first and 'coco/segm_mAP' in first
    second = run(f'{command} --resume {SHORT} train_cfg.max_epochs=2')
    assert 'resumed epoch: 1, iter: 2' in second and len(losses(second)) == 2
    checkpoint = (workspace / 'work_dirs/end-to-end/last_checkpoint').read_text()
    assert checkpoint.endswith('epoch_2.pth')
    tested = run(f'mim test {MMDET} {MINI_CONFIG} --checkpoint {checkpoint} --gpus 0 {SHORT}')
    assert 'Load checkpoint from' in tested and 'coco/segm_mAP' in tested

    # The demo's pictures of it.
    run(
        f'python tools/visualization/predictions.py {MINI_CONFIG} {checkpoint} --out p.png --num-images 3 --score-thr 0'
    )
    run('python tools/analysis_tools/curves.py work_dirs/end-to-end --out c.png')
    for name in ('p.png', 'c.png'):
        picture = plt.imread(workspace / name)
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.05


@pytest.mark.stack
def test_mim_trains_through_this_package(run):
    output = run(f'mim train mmvitzoo {MINI_CONFIG} --gpus 0 --work-dir work_dirs/own {SHORT} train_cfg.max_epochs=1')
    assert len(losses(output)) == 2 and 'coco/bbox_mAP' in output


SEGMENTOR = """
_base_ = ['mmseg::_base_/default_runtime.py', 'mmseg::_base_/schedules/schedule_20k.py']
custom_imports = dict(imports=['mmvitzoo'])
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(160, 160)),
    backbone=dict(type='MPViT', arch='tiny'),
    decode_head=dict(type='FCNHead', in_channels=216, in_index=3, channels=32, num_convs=1, num_classes=11),
    test_cfg=dict(mode='whole'),
)
load, annotate = dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')
resize, pack = dict(type='Resize', scale=(160, 160)), dict(type='PackSegInputs')
dataset = dict(
    type='BaseSegDataset',
    metainfo=dict(classes=[str(i) for i in range(11)], palette=[[i, i, i] for i in range(11)]),
    data_root='data/mini',
    data_prefix=dict(img_path='val', seg_map_path='semantic/val'),
    indices=4,
)
train_dataloader = dict(
    batch_size=2,
    sampler=dict(type='InfiniteSampler'),
    dataset=dict(pipeline=[load, annotate, resize, pack], **dataset),
)
val_dataloader = dict(
    batch_size=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(pipeline=[load, resize, annotate, pack], **dataset),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(logger=dict(interval=1))
"""


@pytest.mark.stack
def test_one_script_for_every_toolbox(run, workspace):
    """A segmentor on the demonstration's semantic maps; its base is MMSegmentation's."""
    (workspace / 'segmentor.py').write_text(SEGMENTOR)
    output = run('python tools/train.py segmentor.py --work-dir work_dirs/segmentor')
    assert len(re.findall(r'Iter\(train\) .* loss: [0-9]', output)) == 2 and 'mIoU' in output
    assert 'mIoU' in run('python tools/test.py segmentor.py work_dirs/segmentor/iter_2.pth')
    assert '--no-validate' in run('python tools/train.py configs/mpvit/mpvit-tiny_8xb128_in1k.py -h')


def test_two_processes_train_and_test_without_gpu(run):
    """SyncBN, which the COCO configs have, exists only on GPUs: each process normalises its batch."""
    options = f'{SHORT} train_cfg.max_epochs=1 model.backbone.norm_cfg.type=SyncBN'
    work_dir = '--work-dir work_dirs/two'
    output = run(f'tools/dist_train.sh {MINI_CONFIG} 2 {work_dir} {options}', PORT='29511')
    assert 'the processes talk through gloo' in output and len(losses(output)) == 1
    output = run(f'tools/dist_test.sh {MINI_CONFIG} work_dirs/two/epoch_1.pth 2 {work_dir} {options}', PORT='29512')
    assert 'coco/segm_mAP' in output


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_wrong_use_of_train_and_test(run, tmp_path, tool):
    assert f'usage: {tool}.py CONFIG' in run(f'python tools/{tool}.py', fails=True)
    assert f'usage: {tool}.py CONFIG' in run(f'python tools/{tool}.py --help')
    assert 'nowhere.py: no such config' in run(f'python tools/{tool}.py nowhere.py', fails=True)
    (tmp_path / 'config.py').write_text("default_scope = 'mmpose'")
    message = run(f'python tools/{tool}.py {tmp_path}/config.py', fails=True)
    assert "default_scope is one of mmdet, mmseg, mmpretrain, got 'mmpose'" in message
    assert '--cfg-options' in run(f'python tools/{tool}.py {MINI_CONFIG} -h')


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
    """What srun would be asked to do."""
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


def test_official2mm(run, workspace, load_golden):
    official = load_golden('mpvit_tiny_official').state_dict
    torch.save({'model': official}, workspace / 'mpvit_tiny.pth')
    command = 'python tools/model_converters/official2mm.py mpvit_tiny.pth out/mm.pth'
    output = run(command)
    assert re.search(r'family +mpvit \(official layout\)', output) and re.search(r'variant +tiny', output)
    assert re.search(r'tensors +551', output) and re.search(r'dropped +322: equal copy', output)
    written = load(workspace / 'out' / 'mm.pth')
    assert written.keys() == convert(official).state_dict.keys()
    assert 'out/mm.pth: exists already and is not overwritten; --force replaces it' in run(command, fails=True)
    run(f'{command} --force')

    (workspace / 'page.pth').write_text('<html>')
    message = run('python tools/model_converters/official2mm.py page.pth out/page.pth', fails=True)
    assert message.count('\n') == 1 and 'page.pth: is neither' in message
    torch.save({'conv.weight': torch.zeros(1)}, workspace / 'other.pth')
    message = run('python tools/model_converters/official2mm.py other.pth out/page.pth', fails=True)
    assert message.count('\n') == 1 and 'other.pth: the keys fit no layout' in message
    assert not (workspace / 'out' / 'page.pth').exists()


def test_make_mini_coco(run, workspace):
    assert 'digits to train' in run('python tools/dataset_converters/make_mini_coco.py other/mini')
    assert (workspace / 'other/mini/annotations/instances_val.json').is_file()
    (workspace / 'taken').mkdir()
    assert 'choose another folder' in run('python tools/dataset_converters/make_mini_coco.py taken', fails=True)


def test_timm_there_and_back(run, workspace):
    """mm2timm.py undoes timm2mm.py; both refuse what is not theirs."""
    torch.manual_seed(0)
    weights = timm.create_model('vit_tiny_patch16_224', num_classes=5).state_dict()
    save(weights, workspace / 'vit.safetensors', overwrite=True)
    converters = 'python tools/model_converters'
    output = run(f'{converters}/timm2mm.py vit.safetensors out/vit_mm.pth')
    assert re.search(r'family +plainvit \(timm layout\)', output) and re.search(r'variant +tiny', output)
    run(f'{converters}/mm2timm.py out/vit_mm.pth out/vit_timm.safetensors')
    again = load(workspace / 'out' / 'vit_timm.safetensors')
    assert again.keys() == weights.keys() and all(torch.equal(again[key], value) for key, value in weights.items())
    message = run(f'{converters}/timm2mm.py out/vit_mm.pth out/x.pth', fails=True)
    assert 'is of the plainvit/mmvitzoo layout, not of timm' in message

    # To MMPretrain's names and from there.
    run(f'{converters}/mm2mmpretrain.py out/vit_mm.pth out/vit_mmpretrain.pth')
    assert 'backbone.layers.11.ffn.layers.1.weight' in load(workspace / 'out' / 'vit_mmpretrain.pth')
    run(f'{converters}/mm2timm.py out/vit_mmpretrain.pth out/vit_timm2.pth')
    again = load(workspace / 'out' / 'vit_timm2.pth')
    assert again.keys() == weights.keys() and all(torch.equal(again[key], value) for key, value in weights.items())

    # A distilled DeiT tells what it loses; a segmentor's head stays behind.
    distilled = timm.create_model('deit_tiny_distilled_patch16_224').state_dict()
    torch.save({'model': distilled}, workspace / 'distilled.pth')
    output = run(f'{converters}/timm2mm.py distilled.pth out/distilled.pth')
    assert re.search(r'dropped +3: PlainViT has no distillation token', output)
    segmentor = {**load(workspace / 'out' / 'vit_mm.pth'), 'decode_head.conv_seg.weight': torch.zeros(1)}
    torch.save({'state_dict': segmentor}, workspace / 'segmentor.pth')
    output = run(f'{converters}/mm2timm.py segmentor.pth out/from_segmentor.pth')
    assert re.search(r'dropped +1: has no place in the timm layout', output)


@pytest.mark.stack
def test_vit2mmseg(run, workspace):
    """What it writes, MMSegmentation loads through its own init_cfg."""
    from mmseg.models.backbones import VisionTransformer

    torch.manual_seed(0)
    weights = timm.create_model('deit_tiny_patch16_224').state_dict()
    torch.save({'model': weights}, workspace / 'deit.pth')
    output = run('python tools/model_converters/vit2mmseg.py deit.pth out/deit_mmseg.pth --force')
    assert re.search(r'dropped +2: belongs to the classifier', output)
    checkpoint = str(workspace / 'out' / 'deit_mmseg.pth')
    model = VisionTransformer(
        embed_dims=192, num_layers=12, num_heads=3, final_norm=True, patch_bias=True, pretrained=checkpoint
    )
    model.init_weights()
    assert torch.equal(model.layers[7].ffn.layers[1].weight, weights['blocks.7.mlp.fc2.weight'])
    assert set(model.state_dict()) == set(load(checkpoint))


@pytest.mark.stack
def test_small_plain_models_train(run, workspace):
    """A segmentor; a classifier whose weights, in timm's names, start a segmentor and a detector."""
    short = '--cfg-options default_hooks.logger.interval=1 '
    segment = f'--work-dir work_dirs/seg {short} train_cfg.max_iters=2 val_dataloader.dataset.indices=2'
    assert 'mIoU' in run(f'python tools/train.py configs/vit/plainvit-mini_mln_upernet_mini-coco.py {segment}')
    output = run(
        'python tools/train.py configs/vit/plainvit-mini_mini-classes.py --work-dir work_dirs/classes '
        f'{short} train_cfg.max_epochs=1 train_cfg.val_interval=1 train_dataloader.dataset.indices=64'
    )
    assert 'accuracy/top1' in output
    run(
        'python tools/model_converters/mm2timm.py work_dirs/classes/epoch_1.pth checkpoints/plainvit_mini_timm.pth '
        '--force'
    )
    output = run(f'python tools/train.py configs/vit/plainvit-mini-pretrained_mln_upernet_mini-coco.py {segment}')
    assert 'PlainViT: loaded 87 tensors' in output and 'weights are new' not in output and 'mIoU' in output
    output = run(
        'python tools/train.py configs/vitdet/mask-rcnn_plainvit-mini-pretrained_mini-coco.py '
        f'--work-dir work_dirs/vitdet {SHORT} train_cfg.max_epochs=1'
    )
    assert 'PlainViT: loaded 87 tensors' in output and 'weights are new' not in output
    assert len(losses(output)) == 2 and 'coco/segm_mAP' in output


def test_benchmark(run, workspace):
    script = 'python tools/analysis_tools/benchmark.py'
    output = run(f'{script} upernet-base --rounds 1 --threads 1 --json out/speed.json')
    assert re.search(r'timm vit_base_patch16_224 +[0-9.]+ s +[0-9.]+x +[0-9]+ MiB +[0-9.]+x', output)
    results = json.loads((workspace / 'out/speed.json').read_text())['upernet-base']
    assert len(results) == 3 and all(x['seconds'] > 0 and x['mebibytes'] > 0 for x in results.values())
    assert 'unknown case x; known are' in run(f'{script} x', fails=True)
    assert '--fuse is for inference' in run(f'{script} mpvit-small --fuse --train', fails=True)
    if not torch.cuda.is_available():
        assert 'torch sees no GPU' in run(f'{script} mpvit-small --device cuda', fails=True)


@pytest.mark.parametrize('options', ['--train', '--bf16', '--channels-last', '--train --bf16 --channels-last'])
def test_benchmark_of_a_training_step(options, run, workspace):
    """Every case runs in every kind of run; the chart is drawn."""
    cases = 'vit-base mvitv2-tiny mpvit-small scalablevit-small'
    chart = workspace / 'out' / 'chart.png'
    chart.unlink(missing_ok=True)
    options = f'--shape 1 224 224 --rounds 1 --threads 1 {options} --chart {chart}'
    output = run(f'python tools/analysis_tools/benchmark.py {cases} {options}')
    names = re.findall(r'^(\S+) +(\S.*?) +[0-9.]+ s', output, re.MULTILINE)
    assert len(names) == 2 + 4 + 2 + 2 and 'left out' not in output
    assert plt.imread(chart).shape[1] > 500
