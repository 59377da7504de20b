"""The notebooks run with the expected results, and the committed outputs are those of a run."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / 'docs' / 'notebooks').glob('*.ipynb'))


def execute(name, parameters, check, folder):
    """Runs a notebook with other parameters and the check as an additional last cell; returns its pictures."""
    import nbformat
    from nbclient import NotebookClient

    (path,) = [path for path in NOTEBOOKS if path.stem == name]
    notebook = nbformat.read(path, as_version=4)
    (index,) = [i for i, cell in enumerate(notebook.cells) if 'parameters' in cell.metadata.get('tags', ())]
    assert all(re.search(f'^{key} = ', notebook.cells[index].source, re.MULTILINE) for key in parameters)
    source = '\n'.join(f'{key} = {value!r}' for key, value in parameters.items())
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(source))
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', IPYTHONDIR=str(folder / 'ipython'))
    client = NotebookClient(notebook, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(folder)}})
    client.execute(env=env)
    return pictures(notebook)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get('outputs', ())]


def pictures(notebook):
    return [output.data['image/jpeg'] for output in outputs(notebook) if 'image/jpeg' in output.get('data', ())]


def test_fine_tune_trains_and_predicts(workspace, tmp_path):
    """With eight images of two classes, the loss decreases and the detector predicts both classes only."""
    mini = workspace / 'data' / 'mini'
    (tmp_path / 'own' / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        (tmp_path / 'own' / split).symlink_to(mini / split)
        coco = json.loads((mini / 'annotations' / f'instances_{split}.json').read_text())
        coco['images'] = coco['images'][:8]
        coco['annotations'] = [ann for ann in coco['annotations'] if ann['image_id'] <= 8]
        for ann in coco['annotations']:
            ann['category_id'] = 5 if ann['category_id'] % 2 else 9
        coco['categories'] = [dict(id=9, name='odd'), dict(id=5, name='even')]
        (tmp_path / 'own' / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))
    check = """
assert split.classes == ['odd', 'even'] and sum(boxes) > 8
assert cfg.model.bbox_head.num_classes == 2 and runner.model.bbox_head.num_classes == 2
assert runner.iter == len(losses) == 16 and Path(last).name == 'epoch_4.pth'
assert losses[-1]['loss'] < 0.99 * losses[0]['loss'], (losses[0], losses[-1])
assert any('coco/bbox_mAP' in record for record in records)
predict.score_thr = 0
found = predict(info['img_path']).result['objects']
assert found and {x['class'] for x in found} <= {'odd', 'even'}
"""
    parameters = dict(folder='own', epochs=4, work_dir='work')
    assert len(execute('fine_tune', parameters, check, tmp_path)) == 4


def test_compare_backbones_shows_cost_shapes_and_features(tmp_path, load_golden):
    """Cost equals that of the model zoo, shapes follow the contract, and weights come from a file."""
    torch.save({'model': load_golden('mpvit_tiny_official').state_dict}, tmp_path / 'mpvit.pth')
    check = """
assert [type(x).__name__ for x in backbones.values()] == ['MPViT', 'MViTv2', 'ScalableViT', 'PlainViT', 'ViTAE']
assert all(x.training is False for x in backbones.values())
found = torch.load('mpvit.pth')['model']['stem.0.conv.weight']
assert torch.equal(backbones[names[0]].state_dict()['stem.0.conv.weight'], found)
# Parameters and FLOPs of the published classifier without its head of 1000 classes.
assert params[names[0]] == 5843736 - 217 * 1000
flops = sum(count_flops(backbones[names[0]], torch.empty(1, 3, 224, 224)).values())
assert abs(flops / (1654164352 - 216 * 1000) - 1) < 1e-4
assert all(len(costs[name]) == len(times[name]) == len(shapes[name]) == 2 for name in names)
assert all(0 < small < large for small, large in costs.values())
assert all(x > 0 for own in times.values() for x in own)
assert shapes[names[0]][1] == [(96, 24, 32), (176, 12, 16), (216, 6, 8), (216, 3, 4)]
assert shapes[names[3]][1] == [(384, 6, 8)] * 4
for name in names:
    assert maps[name].grid.stride == 16 and maps[name].rgb.shape == (6, 8, 3) and 0 < maps[name].explained_variance <= 1
    assert maps[name].rgb.std() > 0.05
"""
    first = 'retinanet_mpvit-tiny_fpn_1x_coco'
    parameters = dict(sizes=[(64, 64), (96, 128)], rounds=1, checkpoints={first: 'mpvit.pth'})
    assert len(execute('compare_backbones', parameters, check, tmp_path)) == 2


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_clean(path):
    """Outputs of a single run without errors, warnings and absolute paths; the file is small."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == 'code']
    assert counts == list(range(1, len(counts) + 1))
    assert path.stat().st_size < 500_000 and len(pictures(notebook)) >= 2
    for output in outputs(notebook):
        assert output.output_type != 'error' and output.get('name') != 'stderr'
    text = re.sub(r'"image/jpeg": "[^"]*"', '', path.read_text())
    assert not re.search(r'["\s(=\'](/(home|root|tmp|work|usr|opt|mnt|Users)/|[A-Z]:\\\\)', text)
