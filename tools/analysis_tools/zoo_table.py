"""Measures the models of the zoo and updates its tables: zoo_table.py [FAMILY ...].

The tool writes parameters and FLOPs of each model to `configs/*/metafile.yml`, which also hold the published values.
From these files it generates the tables in `configs/*/README.md`, between `<!-- zoo: DATASET -->` and `<!-- end -->`,
and the pages `docs/model_zoo.md` and `docs/costs.md`.
"""

import argparse
import re
from pathlib import Path
from typing import Any, Dict, List, Optional

import yaml
from mmengine.logging import MMLogger

from mmvitzoo.analysis.cost import measure
from mmvitzoo.engine import read_config

ROOT = Path(__file__).resolve().parents[2]
DATASETS = ('ImageNet-1k', 'COCO', 'LVIS v1', 'ADE20K')
METRICS = {
    'Top 1 Accuracy': 'Top-1',
    'box AP': 'Box AP',
    'mask AP': 'Mask AP',
    'mIoU': 'mIoU',
    'mIoU(ms+flip)': 'mIoU, multi-scale and flip',
}
LEGEND = (
    'Metrics are those that the authors publish for their weights; no model was trained here. "Weights" is their '
    'checkpoint of the whole model, of the linear segmentors of DINOv2 that of the head. The weights of the backbone '
    'from which a training starts are in `init_cfg` of each config. Parameters are in millions and FLOPs in billions; '
    'a multiply-add counts as one. Images have 224 x 224 pixels in classification, 512 x 2048 in segmentation, '
    '800 x 1280 in detection, and 1024 x 1024 for ViTDet. '
    '`python tools/analysis_tools/get_flops.py CONFIG --shape H W` counts for another size. '
    '[Measured and published cost](costs.md) compares them with the sources.'
)
COST_LEGEND = (
    'This page is for maintainers. `tools/analysis_tools/zoo_table.py` measures parameters (in millions) and FLOPs (in '
    'billions; a multiply-add counts as one). The published values follow with their relative difference. The first '
    'FLOPs value counts all operations. The second counts modules only, without the matrix products in attention. The '
    'difference refers to the convention of the source. Detectors are counted with 1000 boxes and 100 masks.'
)


def measured(model: Dict[str, Any]) -> Dict[str, Any]:
    """Returns the metadata of a metafile entry with the measured parameters and FLOPs of its config."""
    cost = measure(read_config(str(ROOT / model['Config'])))
    return {
        **model.get('Metadata', {}),
        'Resolution': '{} x {}'.format(*cost.shape),
        'Parameters': cost.params,
        'FLOPs': cost.flops,
        'Module FLOPs': cost.module_flops,
    }


def differences(model: Dict[str, Any], published: Dict[str, Any]) -> Dict[str, float]:
    """Returns the relative differences to the published values, with FLOPs in the convention of their source."""
    flops = 'FLOPs' if published.get('Convention') == 'all' else 'Module FLOPs'
    ours = {
        'Parameters (M)': model['Metadata']['Parameters'] / 1e6,
        'FLOPs (G)': model['Metadata'][flops] / 1e9,
    }
    return {field: value / published[field] - 1 for field, value in ours.items() if field in published}


def dataset(model: Dict[str, Any]) -> Optional[str]:
    """Returns the dataset of a config by its name; None for the demonstration data, which have no tables."""
    match = re.search('mini-|in1k$|coco|lvis|ade20k', model['Name'])[0]
    return {'in1k': 'ImageNet-1k', 'coco': 'COCO', 'lvis': 'LVIS v1', 'ade20k': 'ADE20K'}.get(match)


def table(models: List[Dict[str, Any]], folder: str) -> str:
    """Formats the models of one dataset as a Markdown table, with links relative to a folder of the repository."""
    # The metrics of the first published row are in the results of the metafile, those of other rows in the row itself.
    rows = [
        (model, published, metrics(model) if i == 0 else published['Metrics'])
        for model in models
        for i, published in enumerate(model.get('Published') or [{}])
    ]
    shown = [metric for metric in METRICS if any(metric in values for *_, values in rows)]
    # The other values of "Weights" are a reason why there are none, or who publishes them.
    weights_of = {model['Name']: model.get('Weights', 'there are none') for model in models}
    has_weights = any(not weights.startswith('there are none') for weights in weights_of.values())
    header = ['Config', 'Params (M)', 'FLOPs (G)', *(METRICS[metric] for metric in shown)]
    lines = [header + ['Weights'] * has_weights]
    for model, published, values in rows:
        source = f', {published["Source"]}' if 'Metrics' in published else ''
        metadata, weights = model['Metadata'], weights_of[model['Name']]
        if weights.startswith('https://'):
            weights = f'[download]({weights})'
        else:
            weights = '' if weights.startswith('there are none') else 'from the authors'
        lines.append(
            [
                link(model, folder) + source,
                f'{metadata["Parameters"] / 1e6:.4g}',
                f'{metadata["FLOPs"] / 1e9:.4g}',
                *(str(values.get(metric, '')) for metric in shown),
                *[weights] * has_weights,
            ]
        )
    return markdown(lines)


def cost_table(models: List[Dict[str, Any]]) -> str:
    """Formats the measured and published cost of models as a Markdown table for ``docs/costs.md``."""
    lines, notes = [['Config', 'Parameters', 'published', 'FLOPs, all / modules', 'published']], []
    for model in models:
        mark = ''
        if 'Note' in model:
            if model['Note'] not in notes:
                notes.append(model['Note'])
            mark = f' [{notes.index(model["Note"]) + 1}]'
        metadata = model['Metadata']
        flops = f'{metadata["FLOPs"] / 1e9:.4g} / {metadata["Module FLOPs"] / 1e9:.4g}'
        for published in model['Published']:
            cells = {}
            for field, difference in differences(model, published).items():
                convention = f', {published["Convention"]}' if 'FLOPs' in field else ''
                cells[field] = f'{published[field]} ({difference:+.1%}{convention})'.replace('-0.0%', '+0.0%')
            if cells:
                costs = [f'{metadata["Parameters"] / 1e6:.4g}', cells.get('Parameters (M)', '')]
                lines.append([link(model, 'docs') + mark, *costs, flops, cells.get('FLOPs (G)', '')])
    return '\n\n'.join([markdown(lines), *(f'[{i}] {note}' for i, note in enumerate(notes, 1))])


def link(model: Dict[str, Any], folder: str) -> str:
    """Returns a Markdown link to the config of a model, relative to a folder of the repository."""
    path = Path('../' * (folder.count('/') + 1), model['Config'])
    if model['Config'].startswith(f'{folder}/'):
        path = Path(model['Config']).name
    return f'[{model["Name"]}]({path})'


def markdown(lines: List[List[str]]) -> str:
    """Formats a header and rows as a Markdown table."""
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in [lines[0], ['---'] * len(lines[0]), *lines[1:]])


def metrics(model: Dict[str, Any]) -> Dict[str, float]:
    """Returns the metrics of all tasks of a metafile entry."""
    results = model.get('Results', [])
    return {name: value for result in results for name, value in result.get('Metrics', {}).items()}


def fill(readme: str, models: List[Dict[str, Any]], folder: str) -> str:
    """Replaces the tables between the markers of a page."""

    def replace(match):
        selected = [model for model in models if dataset(model) == match[1]]
        return f'<!-- zoo: {match[1]} -->\n{table(selected, folder)}\n<!-- end -->'

    return re.sub('<!-- zoo: (.+?) -->\n.*?<!-- end -->', replace, readme, flags=re.DOTALL)


def zoo_page(families: Dict[str, dict]) -> str:
    """Returns the page of all models, sorted by dataset and family."""
    sections = ['# Model zoo', LEGEND]
    for name in DATASETS:
        sections.append(f'## {name}')
        for index in families.values():
            models = [model for model in index['Models'] if dataset(model) == name]
            if models:
                sections += [f'### {index["Collections"][0]["Name"]}', table(models, 'docs')]
    return '\n\n'.join(sections) + '\n'


def cost_page(families: Dict[str, dict]) -> str:
    """Returns the page of the measured and published cost of all models with published values."""
    sections = ['# Measured and published cost', COST_LEGEND]
    for index in families.values():
        fields = {'Parameters (M)', 'FLOPs (G)'}
        models = [model for model in index['Models'] if any(fields & x.keys() for x in model.get('Published', ()))]
        if models:
            sections += [f'## {index["Collections"][0]["Name"]}', cost_table(models)]
    return '\n\n'.join(sections) + '\n'


def main(argv: Optional[List[str]] = None):
    all_families = sorted(path.parent.name for path in ROOT.glob('configs/*/metafile.yml'))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'families', nargs='*', metavar='FAMILY', help=f'families to measure: {", ".join(all_families)} (default: all)'
    )
    args = parser.parse_args(argv)
    unknown = sorted(set(args.families) - set(all_families))
    if unknown:
        parser.error(f'unknown family {", ".join(unknown)}; choose from {", ".join(all_families)}')
    MMLogger.get_current_instance().setLevel('ERROR')  # hides messages about initial weights
    families = {}
    for family in all_families:
        folder = ROOT / 'configs' / family
        index = yaml.safe_load((folder / 'metafile.yml').read_text())
        if family in (args.families or all_families):
            for model in index['Models']:
                model['Metadata'] = measured(model)
                print(model['Name'], model['Metadata'], flush=True)
            text = yaml.safe_dump(index, sort_keys=False, allow_unicode=True, width=110)
            (folder / 'metafile.yml').write_text(text)
            readme = folder / 'README.md'
            readme.write_text(fill(readme.read_text(), index['Models'], f'configs/{family}'))
        families[family] = index
    (ROOT / 'docs' / 'model_zoo.md').write_text(zoo_page(families))
    (ROOT / 'docs' / 'costs.md').write_text(cost_page(families))


if __name__ == '__main__':
    main()
