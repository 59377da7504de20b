"""A training with a config of tools/adapt_config.py."""

import importlib.util
import json
import re
from pathlib import Path

import make_mini_coco
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from mmvitzoo import get_config
from mmvitzoo.checkpoints import load

spec = importlib.util.spec_from_file_location(
    'adapt_config', Path(__file__).resolve().parents[2] / 'tools' / 'adapt_config.py'
)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
MINI = 'retinanet_scalablevit-mini_fpn_mini-coco'


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of four training and two validation images in three classes."""
    monkeypatch.setattr(make_mini_coco, 'NUM_IMAGES', dict(train=4, val=2))
    make_mini_coco.build_mini_coco(tmp_path / 'own')
    for path in (tmp_path / 'own' / 'annotations').iterdir():
        coco = json.loads(path.read_text())
        for ann in coco['annotations']:
            ann['category_id'] = 1 + ann['category_id'] % 3
        path.write_text(json.dumps(dict(coco, categories=[dict(id=i, name=name) for i, name in enumerate('abc', 1)])))
    return tmp_path / 'own'


@pytest.mark.stack
def test_adapted_config_trains_from_another_detector(own, tmp_path, capfd):
    init_default_scope('mmdet')
    detector = MODELS.build(get_config(MINI).model)
    torch.save({'state_dict': detector.state_dict()}, tmp_path / 'detector.pth')
    tool.adapt_config(MINI, own, tmp_path / 'mine.py', checkpoint=str(tmp_path / 'detector.pth'), epochs=1)
    config = Config.fromfile(tmp_path / 'mine.py')
    config.work_dir = str(tmp_path / 'work')
    options = {'default_hooks.logger.interval': 1, 'model.test_cfg.score_thr': 0}
    for name in ('train', 'val', 'test'):
        options.update({f'{name}_dataloader.num_workers': 0, f'{name}_dataloader.persistent_workers': False})
    config.merge_from_dict(options)
    Runner.from_cfg(config).train()
    output = capfd.readouterr().out
    assert len(re.findall(r'Epoch\(train\).* loss: [0-9]', output)) == 2 and 'coco/bbox_mAP' in output
    # Only weights that depend on the classes keep their random values.
    assert 'lacks 2 weights of RetinaNet, such as bbox_head.retina_cls.bias of shape (27,)' in output
    trained = load(tmp_path / 'work' / 'epoch_1.pth')
    assert trained['bbox_head.retina_cls.weight'].shape[0] == 9 * 3
