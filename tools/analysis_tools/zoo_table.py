"""Measures the configs of the model zoo and writes its tables: zoo_table.py [FAMILY ...].

Parameters and FLOPs of every model go into `configs/*/metafile.yml`, beside what was published of
it. From there tables are written: into `configs/*/README.md`, in place of what stands between
`<!-- zoo: DATASET -->` and `<!-- end -->`, and into `docs/model_zoo.md`.
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
    'Parameters in millions and FLOPs in billions, one for a multiplication with its addition: measured here by '
    '`tools/analysis_tools/zoo_table.py`, and as published, with the difference. FLOPs are of all operations and, '
    'after the stroke, of modules only, without the products within attention; the difference is to the one that '
    'the source counts. Images have 224 x 224 pixels in classification, 512 x 2048 in segmentation, 800 x 1280 in '
    'detection, and 1024 x 1024 for ViTDet; detectors count 1000 boxes and 100 masks. Metrics are the published '
    'ones, of the weights that the originals publish; nothing was trained here.'
)


def measured(model: Dict[str, Any]) -> Dict[str, Any]:
    """Metadata of an entry of a metafile, with what its config costs."""
    cost = measure(read_config(str(ROOT / model['Config'])))
    return {
        **model.get('Metadata', {}),
        'Resolution': '{} x {}'.format(*cost.shape),
        'Parameters': cost.params,
        'FLOPs': cost.flops,
        'Module FLOPs': cost.module_flops,
    }


def differences(model: Dict[str, Any], published: Dict[str, Any]) -> Dict[str, float]:
    """Relative differences to the fields of a published row, FLOPs in the convention of its source."""
    counted = 'FLOPs' if published.get('Convention') == 'all' else 'Module FLOPs'
    ours = {
        'Parameters (M)': model['Metadata']['Parameters'] / 1e6,
        'FLOPs (G)': model['Metadata'][counted] / 1e9,
    }
    return {field: value / published[field] - 1 for field, value in ours.items() if field in published}


def dataset(model: Dict[str, Any]) -> Optional[str]:
    """By the name of a config; None for the demonstration data, which have no tables."""
    kind = re.search('mini-|in1k$|coco|lvis|ade20k', model['Name'])[0]
    return {'in1k': 'ImageNet-1k', 'coco': 'COCO', 'lvis': 'LVIS v1', 'ade20k': 'ADE20K'}.get(kind)


def table(models: List[Dict[str, Any]], folder: str) -> str:
    """Markdown of entries of one dataset; links are relative to a folder of the repository."""
    # The first published row has the metrics of the results, others their own.
    rows = [
        (model, published, metrics(model) if i == 0 else published['Metrics'])
        for model in models
        for i, published in enumerate(model.get('Published', [{}]))
    ]
    shown = [metric for metric in METRICS if any(metric in values for *_, values in rows)]
    costs = ['Parameters', 'published', 'FLOPs, all / modules', 'published']
    header = ['Config', *costs, *(METRICS[metric] for metric in shown)]
    lines, notes = [header, ['---'] * len(header)], []
    for model, published, values in rows:
        link = Path('../' * (folder.count('/') + 1), model['Config'])
        if model['Config'].startswith(f'{folder}/'):
            link = Path(model['Config']).name
        mark = ''
        if 'Note' in model:
            if model['Note'] not in notes:
                notes.append(model['Note'])
            mark = f' [{notes.index(model["Note"]) + 1}]'
        if 'Metrics' in published:
            mark += f', {published["Source"]}'
        cells = {}
        for field, difference in differences(model, published).items():
            convention = f', {published["Convention"]}' if 'FLOPs' in field else ''
            cells[field] = f'{published[field]} ({difference:+.1%}{convention})'.replace('-0.0%', '+0.0%')
        metadata = model['Metadata']
        flops = f'{metadata["FLOPs"] / 1e9:.4g} / {metadata["Module FLOPs"] / 1e9:.4g}'
        lines.append(
            [
                f'[{model["Name"]}]({link}){mark}',
                f'{metadata["Parameters"] / 1e6:.4g}',
                cells.get('Parameters (M)', ''),
                flops,
                cells.get('FLOPs (G)', ''),
                *(str(values.get(metric, '')) for metric in shown),
            ]
        )
    text = '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)
    return '\n\n'.join([text, *(f'[{i}] {note}' for i, note in enumerate(notes, 1))])


def metrics(model: Dict[str, Any]) -> Dict[str, float]:
    results = model.get('Results', [])
    return {name: value for result in results for name, value in result.get('Metrics', {}).items()}


def fill(readme: str, models: List[Dict[str, Any]], folder: str) -> str:
    """A page whose marked places hold the tables of their datasets."""

    def place(match):
        chosen = [model for model in models if dataset(model) == match[1]]
        return f'<!-- zoo: {match[1]} -->\n{table(chosen, folder)}\n<!-- end -->'

    return re.sub('<!-- zoo: (.+?) -->\n.*?<!-- end -->', place, readme, flags=re.DOTALL)


def page(families: Dict[str, dict]) -> str:
    """All models, by dataset and family."""
    parts = ['# Model zoo', LEGEND]
    for name in DATASETS:
        parts.append(f'## {name}')
        for family, index in families.items():
            models = [model for model in index['Models'] if dataset(model) == name]
            if models:
                parts += [f'### {family}', table(models, 'docs')]
    return '\n\n'.join(parts) + '\n'


def main(argv: Optional[List[str]] = None):
    known = sorted(path.parent.name for path in ROOT.glob('configs/*/metafile.yml'))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('families', nargs='*', metavar='FAMILY', help=f'to measure: {", ".join(known)}; default: all')
    args = parser.parse_args(argv)
    unknown = set(args.families) - set(known)
    if unknown:
        parser.error(f'unknown family {", ".join(unknown)}; known are {", ".join(known)}')
    MMLogger.get_current_instance().setLevel('ERROR')  # what layers say of their initial weights
    families = {}
    for family in known:
        folder = ROOT / 'configs' / family
        index = yaml.safe_load((folder / 'metafile.yml').read_text())
        if family in (args.families or known):
            for model in index['Models']:
                model['Metadata'] = measured(model)
                print(model['Name'], model['Metadata'], flush=True)
            text = yaml.safe_dump(index, sort_keys=False, allow_unicode=True, width=110)
            (folder / 'metafile.yml').write_text(text)
            readme = folder / 'README.md'
            readme.write_text(fill(readme.read_text(), index['Models'], f'configs/{family}'))
        families[family] = index
    (ROOT / 'docs' / 'model_zoo.md').write_text(page(families))


if __name__ == '__main__':
    main()
