"""The documentation builds, and its examples and commands run."""

import inspect
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from http.client import HTTPConnection
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name, walk_packages

import pytest
import torch
import yaml
from forms import free_port
from test_readme import COMMANDS as COMMANDS_OF_README

import mmvitzoo
from mmvitzoo.analysis.cost import measure
from mmvitzoo.checkpoints import save
from mmvitzoo.checkpoints.layouts import LAYOUTS, Dropped
from mmvitzoo.inference import load_model
from mmvitzoo.models import MPViT, MViTv2, PlainViT, ScalableViT, SimpleFeaturePyramid, ViTAE

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / 'docs'
BLOCK = re.compile(r'^```(\w+)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PATH = re.compile(r'# (\S+/\S+)\n')  # first line of a block that is a file
PAGES = {path.stem: path.read_text() for path in sorted(DOCS.glob('*.md'))}
BACKBONES = (MPViT, MViTv2, ScalableViT, PlainViT, ViTAE)
FAMILY_PAGE = PAGES.pop('adding_a_family')  # test_adding_a_family runs it as a whole
EXAMPLES = [
    (page, block)
    for page, text in PAGES.items()
    for language, block in BLOCK.findall(text)
    if language == 'python' and '_base_' in block
]


def test_site_builds_without_warnings_and_documents_all_exports(tmp_path):
    """Broken links to pages, headings, files and names of the package are warnings."""
    options = ['-q', '-W', '--keep-going', '-d']
    command = [sys.executable, '-m', 'sphinx', *options, tmp_path / 'cache', DOCS, tmp_path / 'html']
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    for page in DOCS.rglob('*.md'):
        assert (tmp_path / 'html' / page.relative_to(DOCS)).with_suffix('.html').exists()

    # Links of included files are relative to the folder of the page.
    family = (tmp_path / 'html/families/mpvit.html').read_text()
    assert 'href="../model_zoo.html"' in family
    assert re.search('download="" href="[^"]*/mpvit-tiny_8xb128_in1k.py"', family)
    assert 'href="families/vitdet.html"' in (tmp_path / 'html/detectron2.html').read_text()

    # All exported classes and functions are documented.
    documented = re.findall(r'<dt class="sig[^>]* id="([\w.]+)"', (tmp_path / 'html/api.html').read_text())
    documented = {id(resolve_name(name)) for name in documented}
    packages = [mmvitzoo, *(import_module(x.name) for x in walk_packages(mmvitzoo.__path__, 'mmvitzoo.') if x.ispkg)]
    exported = [getattr(package, name) for package in packages for name in getattr(package, '__all__', ())]
    exported = [x for x in exported if inspect.isclass(x) or inspect.isfunction(x)]
    assert len(exported) > 50 and not [x for x in exported if id(x) not in documented]


@pytest.mark.parametrize('page, example', EXAMPLES, ids=lambda x: x if x in PAGES else '')
def test_config_example_builds_and_computes_shapes(page, example, tmp_path):
    """Channels of backbone, neck and heads fit."""
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    path = tmp_path / 'configs/vitdet/example.py'
    path.write_text(example)
    cost = measure(mmvitzoo.get_config(str(path)), (256, 320))
    assert cost.params > 1e6 and cost.flops > 1e8


@pytest.fixture(scope='module')
def prepared(mock_datasets):
    """Adds the checkpoints of the first training, with random weights."""
    torch.manual_seed(0)
    weights = load_model('mask-rcnn_mpvit-tiny_fpn_mini-coco').state_dict()
    for path in {path for text in PAGES.values() for path in re.findall(r'work_dirs/mini/epoch_\d+\.pth', text)}:
        save(weights, mock_datasets / path, overwrite=True)
    return mock_datasets


@pytest.mark.parametrize('page', [page for page, text in PAGES.items() if re.search('^```python', text, re.MULTILINE)])
def test_python_blocks_run(page, prepared, monkeypatch, capsys):
    """The blocks of a page share a namespace; a text block is the output of the block before it."""
    monkeypatch.chdir(prepared)
    blocks, values = BLOCK.findall(PAGES[page]), {}
    for (language, block), (following, text) in zip(blocks, [*blocks[1:], ('', '')]):
        if language == 'python' and '_base_' not in block:
            capsys.readouterr()
            exec(block, values)
            if following == 'text':
                assert capsys.readouterr().out == text


# Commands that other tests run.
ELSEWHERE = {
    'make [a-z-]+': 'unit/test_setup_env.py',
    'python -m mmvitzoo.ops': 'unit/ops/test_install.py',
    '(pip|mim) install': 'unit/test_package.py',
    'mim train mmdet .* --launcher pytorch': 'docs/test_readme.py',
    'python tools/train.py configs/': 'integration/test_tools.py',
    'python tools/(analysis_tools/curves|visualization/predictions).py': 'integration/test_tools.py',
    'python tools/infer.py': 'integration/test_inference.py',
    'python tools/test.py my_config.py': 'integration/test_tools.py',
    'mim run mmdet (confusion_matrix|analyze_results)': 'integration/test_tools.py',
    'python tools/(train|test|analysis_tools/get_flops).py my_segmentor.py': 'docs/test_docs.py',
    'python tools/merge_lora.py': 'integration/test_tools.py',
    'python -m mmvitzoo.app': 'integration/test_app.py',
    'python tools/deployment/export.py': 'integration/test_export.py',
    'python tools/visualization/(attention|cam|features|receptive_field).py': 'unit/test_analysis.py',
}


@pytest.fixture
def echo(tmp_path):
    """Returns a PATH on which srun and torchrun print their arguments instead of starting processes."""
    for name in ('srun', 'torchrun'):
        (tmp_path / name).write_text('#!/bin/sh\necho "$(basename "$0")" "$@"\n')
        (tmp_path / name).chmod(0o755)
    return f'{tmp_path}{os.pathsep}{os.path.dirname(sys.executable)}{os.pathsep}/usr/bin{os.pathsep}/bin'


@pytest.mark.parametrize('page', [page for page, text in PAGES.items() if re.search('^```bash', text, re.MULTILINE)])
def test_bash_blocks_run(page, run, run_tool, clean_mock_datasets, echo):
    blocks = BLOCK.findall(PAGES[page])
    for (language, block), (following, text) in zip(blocks, [*blocks[1:], ('', '')]):
        if language != 'bash':
            continue
        for command in block.replace('\\\n', '').splitlines():
            if following != 'text' and (command in COMMANDS_OF_README or any(re.match(x, command) for x in ELSEWHERE)):
                continue
            if command.startswith('python tools/'):
                output = run_tool(command[len('python ') :])
            else:
                output = run(f'env PATH={echo} {command}' if re.search('slurm|NNODES', command) else command)
            if 'slurm' in command:
                assert re.search('^srun -p gpu .*--gres=gpu:8 --ntasks=16 ', output, re.MULTILINE)
            if 'NNODES' in command:
                assert re.search('^torchrun --nnodes=2 --node_rank=[01] --nproc_per_node=8 ', output, re.MULTILINE)
            if following == 'text':
                assert text in output


def test_segmentor_of_the_page_trains_and_is_exported(run, prepared, monkeypatch):
    """Two iterations of the config that docs/own_segmentation.md writes, with a small model and small crops."""
    monkeypatch.chdir(prepared)
    blocks, values = BLOCK.findall(PAGES['own_segmentation']), {}
    exec(''.join(block for language, block in blocks if language == 'python'), values)
    config = values['config']
    config.model.backbone.arch = dict(embed_dims=48, num_layers=2, num_heads=3, mlp_ratio=2)
    config.merge_from_dict(
        {
            'model.backbone.init_cfg': None,
            'model.backbone.frozen_stages': 2,
            'model.backbone.img_size': 64,
            'model.neck': dict(in_channels=48, out_channels=32),
            'model.decode_head': dict(in_channels=[32] * 4, channels=32),
            'model.auxiliary_head': dict(in_channels=32, channels=32),
            'model.data_preprocessor.size': (64, 64),
            'model.test_cfg': dict(crop_size=(64, 64), stride=(64, 64)),
            'train_cfg': dict(max_iters=2, val_interval=2),
            'train_dataloader.batch_size': 2,
            'default_hooks.logger.interval': 1,
        }
    )
    for step in config.train_dataloader.dataset.pipeline:
        if step.type == 'RandomCrop':
            step.crop_size = (64, 64)
    for split in ('val', 'test'):
        config[f'{split}_dataloader'].dataset.indices = 1
    config.dump('my_segmentor.py')
    bash = ''.join(block for language, block in blocks if language == 'bash')
    commands = [line for line in bash.splitlines() if 'my_segmentor.py' in line]
    assert len(commands) == 5
    for command in commands:
        output = run(command.replace('iter_20000', 'iter_2').replace('data/mini/val', 'data/mini/val/000001.jpg'))
        if 'train.py' in command:
            assert re.search(r'Iter\(train\) \[2/2\].* decode.loss_ce: [0-9]', output) and 'mIoU' in output
        elif 'export.py' in command:
            assert output.count('relative error') == 3


def test_server_of_the_tutorial_classifies(run, workspace, tmp_path):
    page = (DOCS / 'tutorials/export_and_serve.md').read_text()
    (server,) = [block for language, block in BLOCK.findall(page) if language == 'python']
    (tmp_path / 'serve.py').write_text(server)
    command = re.search(r'^python (tools/deployment/export.py \S+).*?(--format.*?--out exported)', page, re.M | re.S)
    run(f'python {command[1]} {command[2]}/served.onnx')
    port = free_port()
    arguments = [sys.executable, tmp_path / 'serve.py', workspace / 'exported/served.onnx', port]
    image = next((workspace / 'data/mini/classes/val/7').glob('*.jpg')).read_bytes()
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(100):
                time.sleep(0.2)
                with suppress(ConnectionRefusedError), socket.create_connection(('127.0.0.1', int(port))):
                    break
            for body, status, keys in ((image, 200, {'class', 'probability'}), (b'no image', 400, {'error'})):
                connection = HTTPConnection('127.0.0.1', int(port))
                connection.request('POST', '/', body)
                response = connection.getresponse()
                assert (response.status, json.load(response).keys()) == (status, keys)
        finally:
            process.kill()


def test_commands_of_other_tests_are_used_and_tested():
    used = ''.join(block for text in PAGES.values() for language, block in BLOCK.findall(text) if language == 'bash')
    for pattern, path in ELSEWHERE.items():
        assert re.search(f'^{pattern}', used, re.MULTILINE) and (ROOT / 'tests' / path).exists(), pattern


def test_adding_a_family(tmp_path):
    """The files and changes of the page pass the linter and the tests of the page, in a copy of the project."""
    for name in ('mmvitzoo', 'configs', 'tools', 'tests'):
        ignored = shutil.ignore_patterns('__pycache__', 'golden', '.mim')
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    (tmp_path / 'tests/data/golden').symlink_to(ROOT / 'tests/data/golden')
    (tmp_path / 'docs').mkdir()
    for name in ('pyproject.toml', 'model-index.yml'):
        shutil.copy(ROOT / name, tmp_path)
    written, commands = [], []
    for language, block in BLOCK.findall(FAMILY_PAGE):
        if language == 'diff':
            for change in re.split('^--- ', block, flags=re.MULTILINE)[1:]:
                apply(change, tmp_path)
        elif language == 'bash':
            commands += block.splitlines()
        else:
            name = PATH.match(block)[1] if PATH.match(block) else 'configs/twins/README.md'
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(PATH.sub('', block, count=1))
            written.append(name)
    assert len(written) == 6
    env = dict(os.environ, PYTHONPATH=str(tmp_path), OMP_NUM_THREADS='1')
    assert len(commands) == 2
    commands[0] += "' and not compiles' tests/unit/models/test_twins.py"  # compiling takes longer than all other tests
    python_files = ' '.join(name for name in written if name.endswith('.py'))
    lint = [f'python -m ruff {action} {python_files}' for action in ('check', 'format --check')]
    for command in [*lint, *commands]:
        words = [sys.executable, *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-3000:]
    assert '| 24.11 | 3.827 | 81.2 |' in (tmp_path / 'configs/twins/README.md').read_text()
    assert '| 24.11 | 24.1 (+0.0%) |' in (tmp_path / 'docs/costs.md').read_text()
    assert 'twinspcpvt-small_8xb128_in1k' in (tmp_path / 'docs/model_zoo.md').read_text()


def apply(change, root):
    """Applies a change, a file name followed by hunks, to a file that contains each hunk once."""
    name, _, hunks = change.partition('\n')
    content = (root / name).read_text()
    for hunk in re.split('^@@\n', hunks, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        old, new = (''.join(line[1:] for line in lines if line[0] in signs) for signs in (' -', ' +'))
        assert content.count(old) == 1, f'{name} does not contain: {old}'
        content = content.replace(old, new)
    (root / name).write_text(content)


def test_layout_table_equals_layouts():
    """Every layout has a row with the keys of its signature, in the order of recognition."""
    section = PAGES['converters'].split('## Layouts')[1].split('\n## ')[0]
    listed = {}
    family = None
    for line in re.findall(r'^\|(.*)\|$', section, re.MULTILINE)[2:]:
        cells = [cell.strip() for cell in line.split('|')]
        family = cells[0].strip('`') or family
        listed[family, cells[1].strip('`')] = cells[3]
    layouts = list(dict.fromkeys((layout.family, layout.source) for layout in LAYOUTS))
    assert sorted(listed) == sorted(layouts)
    for family in {family for family, _ in layouts}:
        assert [x for x in listed if x[0] == family] == [x for x in layouts if x[0] == family]
    for layout in LAYOUTS:
        keys = re.findall('`(.+?)`', listed[layout.family, layout.source])
        # With or without the prefix of a framework or of a larger model
        pairs = [(f'.{theirs}', f'.{key}') for theirs in layout.signature for key in keys]
        assert any(a.endswith(b) or b.endswith(a) for a, b in pairs), layout.signature


def test_reasons_of_dropped_weights_are_listed():
    reasons = {target.reason for layout in LAYOUTS for target in layout.table.values() if isinstance(target, Dropped)}
    assert len(reasons) >= 10 and all(f'| {reason} |' in PAGES['converters'] for reason in reasons)


def originals():
    """Yields headings of the migration page with the original classes whose arguments they list."""
    import mmpretrain.models as mmpretrain
    import timm.models as timm
    from mmseg.models.backbones import VisionTransformer

    yield "MMPretrain's `MViT`", mmpretrain.MViT
    yield "timm's `MultiScaleVit`", timm.mvitv2.MultiScaleVitCfg
    yield "MMSegmentation's `VisionTransformer`", VisionTransformer
    yield "MMPretrain's `VisionTransformer`", mmpretrain.VisionTransformer
    yield "timm's `VisionTransformer` and `VisionTransformerSAM`", timm.vision_transformer.VisionTransformer
    yield "timm's `VisionTransformer` and `VisionTransformerSAM`", timm.vision_transformer_sam.VisionTransformerSAM


def test_migration_lists_every_argument_of_the_originals():
    sections = re.split('^###? ', PAGES['migrating'], flags=re.MULTILINE)
    sections = dict(section.split('\n', 1) for section in sections)
    for heading, original in originals():
        arguments = set(inspect.signature(original).parameters) - {'kwargs'}
        missing = [name for name in arguments if not re.search(rf'\b{name}\b', sections[heading])]
        assert not missing, f'{heading}: {", ".join(missing)}'


def test_migration_names_only_existing_arguments():
    """Checks each name before = in the column of this package."""
    known = {name for ours in (*BACKBONES, SimpleFeaturePyramid) for name in inspect.signature(ours).parameters}
    known |= {key for ours in BACKBONES for key in next(iter(ours.arch_zoo.values()))}
    known |= {'type', 'checkpoint', 'eps', 'head', 'mid_channels', 'data_preprocessor', 'pad_size_divisor'}
    known |= {'constructor', 'paramwise_cfg', 'layer_decay_rate', 'norm_decay_mult', 'bias_decay_mult', 'custom_keys'}
    known |= {'rel_pos', 'decay_mult'}
    cells = [line.split(' | ')[1] for line in PAGES['migrating'].splitlines() if line.startswith('| `')]
    assert len(cells) > 80
    assert {name for cell in cells for name in re.findall(r'(\w+)=', cell)} <= known


@pytest.mark.parametrize('backbone', BACKBONES)
def test_channel_table_equals_out_channels(backbone):
    (line,) = re.findall(rf'^\| `{backbone.__name__}` .* \| (.*) \|$', PAGES['use_in_a_project'], re.MULTILINE)
    listed = {}
    for part in line.split(';'):
        archs = re.findall(r'\b[a-z0-9_]*[a-z][a-z0-9_]*\b', part)
        listed.update(dict.fromkeys(archs, [int(width) for width in re.findall(r'\b[0-9]+\b', part)]))
    with torch.device('meta'):
        channels = {arch: list(backbone(arch).out_channels) for arch in backbone.arch_zoo}
    if issubclass(backbone, PlainViT):
        channels = {arch: widths[:1] for arch, widths in channels.items()}
    assert listed == channels


def test_spelling():
    done = subprocess.run([sys.executable, '-m', 'codespell_lib'], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.stdout == '' and done.returncode == 0


def test_versions_of_hooks_and_citation_agree():
    pins = dict(
        line.split('==')
        for name in ('tests', 'docs')
        for line in (ROOT / f'requirements/{name}.txt').read_text().splitlines()
        if '==' in line
    )
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
    revisions = {hook['id']: repo['rev'] for repo in hooks for hook in repo['hooks']}
    assert revisions == {name: f'v{pins[name.split("-")[0]]}' for name in ('ruff-check', 'ruff-format', 'codespell')}
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == mmvitzoo.__version__ and citation['license'] == 'Apache-2.0'


@pytest.mark.parametrize('path', sorted(ROOT.glob('.github/ISSUE_TEMPLATE/*.yml')), ids=lambda path: path.stem)
def test_issue_forms_have_required_fields(path):
    """Checks the fields that GitHub requires."""
    form = yaml.safe_load(path.read_text())
    assert form['name'] and form['description'] and form['body']
    identifiers = [element['id'] for element in form['body']]
    assert len(set(identifiers)) == len(identifiers) and all(element['attributes']['label'] for element in form['body'])
