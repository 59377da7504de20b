"""Every command and example of the README works."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
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
    if kind is None or 'converters' in command:
        return command
    command = re.sub(' --gpus 8 --launcher pytorch', ' --gpus 0', command)
    command = re.sub(' 8$', ' 2', command)
    command = re.sub('(epoch|iter)_[0-9]+', lambda match: 'epoch_1' if match[1] == 'epoch' else 'iter_2', command)
    return f'{command} --cfg-options default_hooks.logger.interval=1 {SHORT[kind]}'


@pytest.fixture
def stand_ins(workspace, load_golden):
    """The demonstration data laid out like COCO and ImageNet, random weights like the authors'."""
    from mmdet.datasets import CocoDataset

    (workspace / 'checkpoints').mkdir(exist_ok=True)
    deit = timm.create_model('deit_tiny_patch16_224')
    torch.save({'model': deit.state_dict()}, workspace / 'checkpoints/deit_tiny.pth')
    for arch in ('tiny', 'small'):
        weights = load_golden(f'mpvit_{arch}_official').state_dict
        torch.save({'model': weights}, workspace / f'checkpoints/mpvit_{arch}.pth')
    data, coco, imagenet = (workspace / 'data' / name for name in ('mini', 'coco', 'imagenet'))
    for folder in (coco / 'annotations', imagenet / 'meta'):
        folder.mkdir(parents=True)
    for split in ('train', 'val'):
        (coco / f'{split}2017').symlink_to(data / split)
        annotations = json.loads((data / 'annotations' / f'instances_{split}.json').read_text())
        annotations['categories'] = [dict(id=i, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'], 1)]
        (coco / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(annotations))
        (imagenet / split).symlink_to(data / 'classes' / split)
        crops = sorted((data / 'classes' / split).glob('*/*.jpg'))
        lines = [f'{path.parent.name}/{path.name} {path.parent.name}' for path in crops]
        (imagenet / 'meta' / f'{split}.txt').write_text('\n'.join(lines))


def test_commands(run, stand_ins):
    """In the order of the README, since some need what others made."""
    ran = [command for command in COMMANDS if command not in ELSEWHERE]
    assert len(ran) == 13 and len(COMMANDS) == 16
    for command in ran:
        output = run(shortened(command), PORT='29517')
        if 'model_converters' in command:
            assert re.search(r'^written ', output, re.MULTILINE), command
        elif 'train' in command.split('configs')[0]:
            assert re.search(r'(train\).*2/2\]|Iter\(train\) \[2/2\]).* loss: [0-9]', output), command
        elif 'test' in command:
            assert 'coco/segm_mAP' in output, command


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


@pytest.mark.parametrize('page', ['README.md', *(f'configs/{name}/README.md' for name in FAMILIES)])
def test_links(page):
    links = re.findall(r'\]\(([^)#]+)', (ROOT / page).read_text())
    missing = [x for x in links if not x.startswith('https://') and not (ROOT / page).parent.joinpath(x).exists()]
    assert links and not missing


@pytest.mark.parametrize('family', FAMILIES)
def test_metafile_names_configs(family):
    """Every config but the demonstration's is listed, under its own name."""
    imported = f'configs/{family}/metafile.yml'
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    assert imported in index and len(index) == len(FAMILIES)
    content = yaml.safe_load((ROOT / imported).read_text())
    configs = {str(path.relative_to(ROOT)) for path in ROOT.glob(f'configs/{family}/*.py') if 'mini' not in path.name}
    assert {model['Config'] for model in content['Models']} == configs
    assert all(Path(model['Config']).stem == model['Name'] for model in content['Models'])
    assert (ROOT / content['Collections'][0]['README']).exists()
