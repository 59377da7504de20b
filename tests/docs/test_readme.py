"""Every command and example of the README works."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmvitzoo.inference import read_image

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / 'README.md').read_text()
COMMANDS = ''.join(re.findall(r'```bash\n(.*?)```', README, re.DOTALL)).splitlines()
EXAMPLES = re.findall(r'```python\n(.*?)```', README, re.DOTALL)

FAMILIES = ('mpvit', 'mvitv2', 'scalablevit', 'vit', 'vitdet')

# Run elsewhere: by hand before a release, by CI, by the tests of the wheel, the page and the zoo's names.
ELSEWHERE = (
    'make demo',
    'make test',
    'pip install .',
    'python -m mmvitzoo.app',
    'mim download mmvitzoo --config mvitv2-tiny_8xb256_in1k --dest checkpoints',
)
# Two iterations, two images to evaluate on, where even a detector of two iterations finds something; a
# GPU's worth of work where eight are named.
SHORT = {
    'mini': 'train_dataloader.dataset.indices=4 train_cfg.max_epochs=1 val_dataloader.dataset.indices=2 '
    'test_dataloader.dataset.indices=2',
    'coco': 'train_cfg.max_iters=2 train_cfg.val_interval=2 train_dataloader.batch_size=1 '
    'val_dataloader.dataset.indices=1 test_dataloader.dataset.indices=1 model.test_cfg.rcnn.score_thr=0',
    'in1k': 'train_dataloader.dataset.indices=4 train_dataloader.batch_size=2 train_cfg.max_epochs=6 '
    'val_dataloader.dataset.indices=2',
}


def shortened(command):
    config = re.search(r'configs/\S+|(?<=train.py )my_config.py', command)
    if config is None or 'converters' in command or 'get_flops' in command:
        return command.replace('iter_2400', 'iter_2').replace('data/mini/val --out', 'data/mini/val/000001.jpg --out')
    kind = 'coco' if config[0] == 'my_config.py' else re.search(r'mini|coco|in1k', config[0])[0]
    command = re.sub(' --gpus 8 --launcher pytorch', ' --gpus 0', command)
    command = re.sub(' 8$', ' 2', command)
    command = re.sub('(epoch|iter)_[0-9]+', lambda match: 'epoch_1' if match[1] == 'epoch' else 'iter_2', command)
    return f'{command} --cfg-options default_hooks.logger.interval=1 {SHORT[kind]}'


def test_commands(run, workspace, stand_ins):
    """In the order of the README, since some need what others made."""
    ran = [command for command in COMMANDS if command not in ELSEWHERE]
    assert len(ran) == 21 and len(COMMANDS) == 26
    for command in ran:
        output = run(shortened(command), PORT='29517')
        if 'model_converters' in command:
            assert re.search(r'^written ', output, re.MULTILINE), command
        elif 'train' in command.split('configs')[0]:
            assert re.search(r'(train\).*2/2\]|Iter\(train\) \[2/2\]).* loss: [0-9]', output), command
        elif 'test' in command:
            assert 'coco/segm_mAP' in output, command
        elif 'get_flops' in command:
            assert 'parameters               25.712 M' in output
        elif 'visualization' in command:
            assert read_image(workspace / re.search(r'--out (\S+)', command)[1]).shape[1] >= 1000
        elif 'adapt_config' in command:
            assert 'classes   10: 0, 1, 2' in output
        elif 'infer' in command:
            assert 'seen: 1 of 1 images' in output
        elif 'search' in command:
            assert 'retinanet_mpvit-small_fpn_ms-3x_coco' in output


@pytest.mark.parametrize('example, backbone, detector', [(1, 'MPViT', 'RetinaNet'), (2, 'PlainViT', 'MaskRCNN')])
def test_config_for_another_project(tmp_path, example, backbone, detector):
    (tmp_path / 'config.py').write_text(EXAMPLES[example])
    config = Config.fromfile(tmp_path / 'config.py')
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    assert type(model.backbone).__name__ == backbone and type(model).__name__ == detector
    with torch.no_grad():
        assert len(model.extract_feat(torch.zeros(1, 3, 64, 64))) == 5


def test_choosing():
    values = {}
    exec(EXAMPLES[0], values)
    assert values['config'].model.backbone.type == 'MPViT'
    names = values['mmvitzoo'].list_models(family='mpvit', task='detection')
    assert f'[{names[0]!r}, ...]' in EXAMPLES[0]


def test_conversion_example(tmp_path, monkeypatch, load_golden):
    (tmp_path / 'checkpoints').mkdir()
    torch.save({'model': load_golden('mpvit_tiny_official').state_dict}, tmp_path / 'checkpoints/mpvit_tiny.pth')
    monkeypatch.chdir(tmp_path)
    values = {}
    exec(EXAMPLES[3], values)
    converted = values['converted']
    assert (converted.family, converted.source, converted.arch) == ('mpvit', 'official', 'tiny')
    MODELS.build(converted.backbone_cfg).load_state_dict(converted.backbone, strict=True)
    assert len(EXAMPLES) == 4


def test_nothing_is_left_to_fill_in():
    assert not re.search('@[A-Z]+@|TODO', README)


@pytest.mark.parametrize(
    'page',
    [
        'README.md',
        'docs/model_zoo.md',
        'docs/detectron2.md',
        'docs/performance.md',
        *(f'configs/{name}/README.md' for name in FAMILIES),
    ],
)
def test_links(page):
    links = re.findall(r'\]\(([^)#]+)', (ROOT / page).read_text())
    missing = [x for x in links if not x.startswith('https://') and not (ROOT / page).parent.joinpath(x).exists()]
    assert links and not missing
