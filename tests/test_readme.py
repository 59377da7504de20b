"""Every command and example of the README works."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text()
COMMANDS = ''.join(re.findall(r'```bash\n(.*?)```', README, re.DOTALL)).splitlines()
EXAMPLES = re.findall(r'```python\n(.*?)```', README, re.DOTALL)

FAMILIES = ('mpvit', 'mvitv2', 'scalablevit', 'vit', 'vitdet')

# Run elsewhere: by hand before a release, by CI, and by the test of the wheel.
ELSEWHERE = ('make demo', 'make test', 'pip install .')
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
    kind = re.search(r'mini|coco|in1k', re.search(r'configs/\S+', command)[0])[0] if 'configs/' in command else None
    if kind is None or 'converters' in command or 'get_flops' in command:
        return command
    command = re.sub(' --gpus 8 --launcher pytorch', ' --gpus 0', command)
    command = re.sub(' 8$', ' 2', command)
    command = re.sub('(epoch|iter)_[0-9]+', lambda match: 'epoch_1' if match[1] == 'epoch' else 'iter_2', command)
    return f'{command} --cfg-options default_hooks.logger.interval=1 {SHORT[kind]}'


def test_commands(run, stand_ins):
    """In the order of the README, since some need what others made."""
    ran = [command for command in COMMANDS if command not in ELSEWHERE]
    assert len(ran) == 15 and len(COMMANDS) == 18
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
        elif 'search' in command:
            assert 'retinanet_mpvit-small_fpn_ms-3x_coco' in output


@pytest.mark.parametrize('example, backbone, detector', [(0, 'MPViT', 'RetinaNet'), (1, 'PlainViT', 'MaskRCNN')])
def test_config_for_another_project(tmp_path, example, backbone, detector):
    (tmp_path / 'config.py').write_text(EXAMPLES[example])
    config = Config.fromfile(tmp_path / 'config.py')
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    assert type(model.backbone).__name__ == backbone and type(model).__name__ == detector
    with torch.no_grad():
        assert len(model.extract_feat(torch.zeros(1, 3, 64, 64))) == 5


def test_conversion_example(tmp_path, monkeypatch, load_golden):
    (tmp_path / 'checkpoints').mkdir()
    torch.save({'model': load_golden('mpvit_tiny_official').state_dict}, tmp_path / 'checkpoints/mpvit_tiny.pth')
    monkeypatch.chdir(tmp_path)
    values = {}
    exec(EXAMPLES[2], values)
    converted = values['converted']
    assert (converted.family, converted.source, converted.arch) == ('mpvit', 'official', 'tiny')
    MODELS.build(converted.backbone_cfg).load_state_dict(converted.backbone, strict=True)
    assert len(EXAMPLES) == 3


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
