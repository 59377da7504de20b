"""The model zoo: metafiles, what models cost, and the tables."""

import json
import re

import pytest
import yaml
import zoo_table
from modelindex.load_model_index import load
from zoo_configs import (
    FOLDERS,
    LISTED,
    NAMES,
    RECIPES,
    ROOT,
    group_by,
    module_types,
    read_config,
    read_stock_config,
    size,
)

from mmvitzoo.analysis.cost import default_shape, measure

METAFILES = sorted(ROOT.glob('configs/*/metafile.yml'))
INDEX = {path.parent.name: yaml.safe_load(path.read_text()) for path in METAFILES}
MODELS_OF_ALL = [model for index in INDEX.values() for model in index['Models']]
# {algorithm}_{backbone}[_{neck}]_{schedule}_{dataset}[-{size}], or without an algorithm for classifiers and segmentors.
NAME = re.compile(
    r'((cascade-mask-rcnn|mask-rcnn|retinanet|atss|deformable-detr)_)?'
    r'(mpvit|mvitv2|scalablevit|plainvit|deit|dinov2|dinov3|vitae|convnextv2|eva02|sam2-hiera|swinv2)-[a-z0-9]+'
    r'(-(ln|conv|mae|in21k|pretrained|4ch|gray|plus|reg|frozen|lora|scratch))*(_mln)?(_(fpn|upernet|linear(-ms)?))?'
    r'(_(\d+xb\d+(-\d+[ke])?|1x|ms-3x|lsj-\d+e|lsj-3x))?'
    r'_(in1k|coco|lvis-v1|ade20k-(512x512|640x640)|mini-coco|mini-classes|mini-tree-crowns)'
)


def test_index_parses():
    index = load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    # OpenMMLab names READMEs from the root of the repository, not from the metafile.
    assert not [error for error in index.check(silent=True) if 'README' not in error]
    assert {model.name for model in index.models} == {model['Name'] for model in MODELS_OF_ALL}
    names = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    assert names == [str(path.relative_to(ROOT)) for path in METAFILES]


def test_every_config_is_listed():
    for family, index in INDEX.items():
        models = index['Models']
        assert [model['Config'] for model in models] == [f'configs/{family}/{model["Name"]}.py' for model in models]
        (collection,) = index['Collections']
        assert all(model['In Collection'] == collection['Name'] for model in models)
        assert (ROOT / collection['README']).exists() and (ROOT / collection['Code']['URL']).exists()
    assert sorted(LISTED) == NAMES and len(MODELS_OF_ALL) == len(NAMES)


def test_names_are_openmmlabs():
    assert [model['Name'] for model in MODELS_OF_ALL if not NAME.fullmatch(model['Name'])] == []


SIZES = dict(T='tiny', XS='xsmall', S='small', B='base', L='large', H='huge', g='giant')
SIZES.update({'S+': 'small-plus', 'H+': 'huge-plus', '7B': '7b'})
METRICS = {
    'top1': 'Top 1 Accuracy',
    'top5': 'Top 5 Accuracy',
    'box_map': 'box AP',
    'mask_map': 'mask AP',
    'miou': 'mIoU',
    'miou_ms_flip': 'mIoU(ms+flip)',
}


def words(row):
    """Returns the words in the name of a published row's config."""
    backbone, size = row['backbone'].split('-')
    said = [dict(ViT='plainvit').get(backbone, backbone.lower()) + '-' + SIZES[size]]
    said.append(dict(UperNet='upernet', **{'Semantic FPN': 'fpn'}).get(row['method'], row['method'].lower()))
    said[1] = said[1].replace('r-cnn', 'rcnn').replace(' ', '-').replace('stacked-', '')
    if row['system'] == 'ViT':
        said[1:] = ['upernet', 'mln' if 'MLN' in row['method'] else '', '-ln' if ' LN ' in row['method'] else '']
    schedule = row['schedule'].split(',')[0]
    if 'segmentor' in row['method']:
        return [said[0], '_linear-ms_' if 'multi-scale' in row['method'] else '_linear_', schedule]
    return ['in1k' if 'linear' in said[1] else said[1], *said[2:], '' if 'linear' in said[1] else schedule, said[0]]


def test_published_rows(subtests):
    """Each published row of the source tables is in one metafile with unchanged values."""
    rows = json.loads((ROOT / 'tests/data/published.json').read_text())
    for row in rows:
        metrics = {METRICS[name]: value for name, value in row['metrics'].items() if name in METRICS}
        found = [
            model
            for model in MODELS_OF_ALL
            for i, entry in enumerate(model.get('Published', []))
            if entry['Source'] == row['source']
            and (entry.get('Parameters (M)'), entry.get('FLOPs (G)')) == (row['params_m'], row['flops_g'])
            and (entry['Metrics'] if i else zoo_table.metrics(model)) == metrics
        ]
        with subtests.test(str(words(row))):
            assert len(found) == 1 and all(word in found[0]['Name'] for word in words(row)), found
    # 5 more of Detectron2's.
    assert sum(len(model.get('Published', [])) for model in MODELS_OF_ALL) == len(rows) + 5


# Exact numbers of parameters of the authors' and timm's classifiers.
PARAMS = {
    'mpvit-tiny_8xb128_in1k': 5843736,
    'mpvit-xsmall_8xb128_in1k': 10573448,
    'mpvit-small_8xb128_in1k': 22892400,
    'mpvit-base_8xb128_in1k': 74845976,
    'plainvit-tiny_in1k': 5717416,
    'plainvit-small_in1k': 22050664,
    'plainvit-base_in1k': 86567656,
    'plainvit-large_in1k': 304326632,
    'mvitv2-tiny_8xb256_in1k': 24173320,
    'mvitv2-small_8xb256_in1k': 34870216,
    'mvitv2-base_8xb256_in1k': 51472744,
    'mvitv2-large_8xb256_in1k': 217992952,
}
# FLOPs of the authors' code as MMEngine counts it, which treats pooling and norms a little differently.
FLOPS = {
    'mpvit-tiny_8xb128_in1k': 1_654_163_812,
    'mpvit-xsmall_8xb128_in1k': 2_971_396_560,
    'mpvit-small_8xb128_in1k': 4_799_650_824,
    'mpvit-base_8xb128_in1k': 16_445_326_240,
    'retinanet_mpvit-tiny_fpn_1x_coco': 185.1e9,
    'retinanet_mpvit-small_fpn_1x_coco': 249.6e9,
    'retinanet_mpvit-base_fpn_1x_coco': 488.3e9,
}
# Parameters (M) and FLOPs (G) of the authors' code or of other implementations, for models whose note explains a
# difference to the published values.
NOTED = {
    'retinanet_mpvit-tiny': (15.1, 185.1),
    'mask-rcnn_mpvit-tiny': (25.7, None),
    'scalablevit-small_8xb128_in1k': (32.00, None),
    'scalablevit-large_8xb128_in1k': (109.29, None),
    'retinanet_scalablevit-small': (36.0, None),
    'mask-rcnn_scalablevit-small': (45.9, None),
    'scalablevit-small_fpn': (30.0, None),
    'scalablevit-small_upernet': (56.1, None),
    'mvitv2-large_8xb256_in1k': (217.99, 43.87),
    'cascade-mask-rcnn_mvitv2-large': (265.1, 1474.0),
}


def test_costs_of_the_authors_code():
    listed = {model['Name']: model['Metadata'] for model in MODELS_OF_ALL}
    assert {name: listed[name]['Parameters'] for name in PARAMS} == PARAMS
    for name, flops in FLOPS.items():
        assert listed[name]['FLOPs'] == pytest.approx(flops, rel=3e-4 if flops == round(flops, -8) else 3e-6), name


def test_costs_agree_with_the_published(subtests):
    """Parameters agree within 1% or to the published digits and FLOPs within 3%; otherwise a note gives the reason."""
    for model in MODELS_OF_ALL:
        if 'Published' in model:
            with subtests.test(model['Name']):
                check_published(model)


def check_published(model):
    noted = [numbers for start, numbers in NOTED.items() if model['Name'].startswith(start)]
    assert len(noted) == ('Note' in model)
    if noted:
        ours = model['Metadata']['Parameters'] / 1e6, model['Metadata']['FLOPs'] / 1e9
        for value, expected in zip(ours, noted[0]):
            assert expected is None or value == pytest.approx(expected, rel=2e-3)
        return
    for row in model['Published']:
        for field, difference in zoo_table.differences(model, row).items():
            digits = len(str(row[field]).partition('.')[2])
            rounded = round(model['Metadata']['Parameters'] / 1e6, digits) == row[field]
            assert abs(difference) <= 0.03 if 'FLOPs' in field else abs(difference) <= 0.01 or rounded, field


COSTS = ('Parameters', 'FLOPs', 'Module FLOPs', 'Resolution')


def model_of(config):
    """Returns a key that configs of equal cost share: the model without the settings that do not affect inference."""
    left_out = ('train_cfg', 'test_cfg', 'data_preprocessor')
    model = {key: value for key, value in config.model.items() if key not in left_out}
    model['backbone'] = {
        key: x for key, x in model['backbone'].items() if key not in ('init_cfg', 'drop_path_rate', 'frozen_stages')
    }
    return [model, default_shape(config)]


def check_costs(members):
    cost = measure(read_config(members[0]))
    expected = [cost.params, cost.flops, cost.module_flops, '{} x {}'.format(*cost.shape)]
    for name in members:
        assert [LISTED[name]['Metadata'][key] for key in COSTS] == expected, name


@pytest.mark.parametrize('folder', FOLDERS)
def test_costs_of_each_kind_are_up_to_date(folder, subtests):
    """The metafile has the cost of the smallest published model with each backbone, neck and heads."""
    for members in group_by(module_types, [name for name in RECIPES if name.startswith(f'{folder}/')]):
        name = min(members, key=size)
        with subtests.test(name):
            check_costs([name])


@pytest.mark.slow
@pytest.mark.parametrize('folder', FOLDERS)
def test_costs_are_up_to_date(folder, subtests):
    """The metafile has the cost of each distinct model. Models whose layers do not fit together cannot be counted."""
    names = [name for name in NAMES if name.startswith(f'{folder}/')]
    for members in group_by(model_of, names):
        with subtests.test(', '.join(members)):
            check_costs(members)


@pytest.mark.parametrize('folder', FOLDERS)
def test_equal_models_have_equal_costs(folder):
    for members in group_by(model_of, [name for name in NAMES if name.startswith(f'{folder}/')]):
        costs = [[LISTED[name]['Metadata'][key] for key in COSTS] for name in members]
        assert costs == costs[:1] * len(costs), members


def test_tables_are_up_to_date():
    for family, index in INDEX.items():
        page = (ROOT / 'configs' / family / 'README.md').read_text()
        assert '<!-- zoo: ' in page
        assert zoo_table.fill(page, index['Models'], f'configs/{family}') == page
    assert zoo_table.cost_page(INDEX) == (ROOT / 'docs' / 'costs.md').read_text()
    page = (ROOT / 'docs' / 'model_zoo.md').read_text()
    assert zoo_table.zoo_page(INDEX) == page
    assert all(f'[{model["Name"]}]' in page for model in MODELS_OF_ALL if 'mini-' not in model['Name'])


def test_search():
    """MIM finds the models of the installed package."""
    from mim.commands.search import get_model_info

    found = get_model_info('mmvitzoo', models=['mpvit'], local=True, to_dict=True)
    assert found.keys() == {model['Name'] for model in INDEX['mpvit']['Models']}


def test_attention_counts_two_products_per_block():
    """ViT-T has 12 blocks, 197 tokens and 192 channels; modules only is without ``q k^T`` and its product with v."""
    cost = measure(read_config('vit/plainvit-tiny_in1k.py'))
    assert cost.flops - cost.module_flops == 12 * 2 * 197**2 * 192
    tokens = 12 * 197 * (12 * 192**2 + 2 * 5 * 192)  # four linears with an MLP ratio of 4, two norms
    assert cost.module_flops == 196 * 3 * 16 * 16 * 192 + tokens + 197 * 5 * 192 + 192 * 1000
    assert cost.shape == (224, 224)


@pytest.mark.parametrize(
    'config, flops',
    [
        # Published in READMEs and papers. Cases: 1000 boxes, no masks, constructors that read values of tensors.
        ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', 207.1e9),
        ('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', 264e9),
        ('mmpretrain::resnet/resnet50_8xb32_in1k.py', 4.12e9),
        ('mmpretrain::vision_transformer/vit-base-p16_64xb64_in1k-384px.py', 55.54e9),
        ('mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py', None),
    ],
)
def test_stock_models(config, flops):
    cost = measure(read_stock_config(config))
    assert (
        flops is None
        or cost.module_flops == pytest.approx(flops, rel=0.03)
        or cost.flops == pytest.approx(flops, rel=0.01)
    )


@pytest.mark.parametrize('config', ['htc/htc_r50_fpn_1x_coco', 'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco'])
def test_unknown_parts_are_refused(config):
    with pytest.raises(NotImplementedError, match='cannot be counted: .*semantic_head'):
        measure(read_stock_config(f'mmdet::{config}.py'))


def test_flops_command(run_tool):
    script, config = 'tools/analysis_tools/get_flops.py', 'configs/vit/plainvit-tiny_in1k.py'
    cost = json.loads(run_tool(f'{script} {config} --shape 224 448 --json').splitlines()[-1])
    assert cost['shape'] == [224, 448] and cost['params'] == 5717416 and cost['flops'] > cost['module_flops']
    assert 'FLOPs, modules only      1.080 G' in run_tool(f'{script} {config}')
    assert 'got [8, 224]' in run_tool(f'{script} {config} --shape 8 224', fails=True)
    assert 'no such config' in run_tool(f'{script} nothing.py', fails=True)
    assert 'unknown family nothing' in run_tool('tools/analysis_tools/zoo_table.py nothing', fails=True)
