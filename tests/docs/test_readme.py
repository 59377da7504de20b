"""All commands and examples of the README run."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch._subclasses import FakeTensorMode

from mmvitzoo.images import read_image

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / 'README.md').read_text()
COMMANDS = ''.join(re.findall(r'```bash\n(.*?)```', README, re.DOTALL)).splitlines()
EXAMPLES = re.findall(r'```python\n(.*?)```', README, re.DOTALL)

# Commands that CI or the tests of the installation, the web page and the model zoo run.
ELSEWHERE = re.compile(r'make( |$)|pip install |python -m mmvitzoo\.(app|ops)|mim download ')
TRAINING = re.compile(r'mim train |python tools/train\.py |tools/dist_train\.sh ')
TESTING = re.compile(r'mim test |python tools/test\.py |tools/dist_test\.sh ')
PREDICTION = re.compile(r'python tools/infer\.py ')
# Options for the shortest training, by dataset. After one iteration a detector has to find something.
SHORT = {
    'mini': 'train_dataloader.dataset.indices=4 train_cfg.max_epochs=1 val_dataloader.dataset.indices=2 '
    'test_dataloader.dataset.indices=2',
    'coco': 'train_cfg.max_iters=1 train_cfg.val_interval=1 train_dataloader.batch_size=1 '
    'val_dataloader.dataset.indices=1 test_dataloader.dataset.indices=1 model.train_cfg.rcnn.sampler.num=32 '
    'model.test_cfg.rcnn.score_thr=0 model.test_cfg.rcnn.max_per_img=10 model.train_cfg.rpn_proposal.max_per_img=50',
    'in1k': 'train_dataloader.dataset.indices=4 train_dataloader.batch_size=2 train_cfg.max_epochs=6 '
    'train_cfg.val_interval=6 val_dataloader.dataset.indices=2',
}


def small_image_options(value, path):
    """Yields options that resize images to a quarter of COCO's sizes."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ('scale', 'scales'):
                yield f'{path}.{key}=' + ('(333,200)' if key == 'scale' else '[(333,200)]')
            else:
                yield from small_image_options(item, f'{path}.{key}')
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from small_image_options(item, f'{path}.{i}')


def shorten(command):
    """Returns the command with a shorter training and the checkpoint names that it writes."""
    command = re.sub('epoch_[0-9]+', 'epoch_1', re.sub('iter_[0-9]+', 'iter_1', command))
    if not (TRAINING.match(command) or TESTING.match(command)):
        return command.replace('data/mini/val --out', 'data/mini/val/000001.jpg --out')
    name = re.search(r'\b[\w/.-]+\.py', re.sub(r'tools/\w+\.(py|sh)', '', command))[0]
    config = Config.fromfile(name)
    kind = re.search('mini|coco|in1k', name)
    # my_config.py derives from a COCO config.
    options = ['default_hooks.logger.interval=1', SHORT[kind[0] if kind else 'coco']]
    if kind and kind[0] == 'coco':  # no later command reads the weights with the full config
        options.append('model.roi_head.bbox_head.fc_out_channels=64')
    if kind is None or kind[0] == 'coco':
        for split in ('train', 'val', 'test'):
            pipeline = config[f'{split}_dataloader'].dataset.pipeline
            options += small_image_options(pipeline, f'{split}_dataloader.dataset.pipeline')
    # One process instead of eight GPUs, two processes instead of eight.
    command = re.sub(' 8$', ' 2', command.replace(' --gpus 8 --launcher pytorch', ' --gpus 0'))
    return f'{command} --cfg-options {" ".join(options)}'


def test_commands_run(run, run_tool, workspace, clean_mock_datasets, monkeypatch):
    """Runs the commands in order, since some need the files of others."""
    monkeypatch.chdir(workspace)
    commands = [command for command in COMMANDS if not ELSEWHERE.match(command)]
    assert any(map(TRAINING.match, commands)) and any(map(TESTING.match, commands))
    for command in commands:
        short = shorten(command)
        is_model_run = any(x.match(command) for x in (TRAINING, TESTING, PREDICTION))
        if is_model_run or not command.startswith('python tools/'):  # models take much memory
            output = run(short, PORT='29517')
        else:
            output = run_tool(short[len('python ') :])
        if TRAINING.match(command):
            assert re.search(r'(Epoch|Iter)\(train\).* loss: [0-9]', output), command
        elif TESTING.match(command):
            assert 'coco/segm_mAP' in output, command
        elif 'model_converters' in command:
            assert re.search(r'^written ', output, re.MULTILINE), command
        elif 'get_flops' in command:
            assert 'parameters               25.712 M' in output
        elif 'visualization' in command:
            assert read_image(workspace / re.search(r'--out (\S+)', command)[1]).shape[1] >= 1000
        elif 'adapt_config' in command:
            assert 'classes   10: 0, 1, 2' in output
        elif PREDICTION.match(command):
            assert 'seen: 1 of 1 images' in output
        elif 'search' in command:
            assert 'retinanet_mpvit-small_fpn_ms-3x_coco' in output


def example(*texts):
    """Returns the only Python block that contains the texts."""
    (found,) = [block for block in EXAMPLES if all(text in block for text in texts)]
    return found


def test_config_example_builds_a_detector(tmp_path):
    (tmp_path / 'config.py').write_text(example('_base_', "type='PlainViT'"))
    config = Config.fromfile(tmp_path / 'config.py')
    init_default_scope(config.default_scope)
    with torch.device('meta'):
        model = MODELS.build(config.model).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes without data
        model.to_empty(device='cpu')
        assert type(model.backbone).__name__ == 'PlainViT' and type(model).__name__ == 'MaskRCNN'
        assert len(model.extract_feat(torch.zeros(1, 3, 64, 64))) == 5


def test_model_list_example():
    values, block = {}, example('list_models')
    exec(block, values)
    assert values['config'].model.backbone.type == 'MPViT'
    names = values['mmvitzoo'].list_models(family='mpvit', task='detection')
    assert f'[{names[0]!r}, ...]' in block


def test_no_placeholders_remain():
    assert not re.search('@[A-Z]+@|TODO', README)


PAGES = ['README.md', *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob('configs/*/README.md')))]
PAGES += ['docs/model_zoo.md', 'docs/detectron2.md', 'docs/performance.md']


@pytest.mark.parametrize('page', PAGES)
def test_links(page):
    """Links to files of the repository exist."""
    links = re.findall(r'\]\(([^)#]+)', (ROOT / page).read_text())
    missing = [x for x in links if not x.startswith('https://') and not (ROOT / page).parent.joinpath(x).exists()]
    assert links and not missing
