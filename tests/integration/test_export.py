"""tools/deployment/export.py: all backbones in all formats with dynamic sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export import (
    CHECK_SHAPES,
    EXPORTERS,
    FORMATS,
    TOLERANCE,
    TRACE_SHAPE,
    AdaptivePool,
    ExportModel,
    main,
    relative_error,
)
from forms import FORMS, slim
from torch import nn

from mmvitzoo.checkpoints import save
from mmvitzoo.inference import load_model

SIZES = ((1, 3, 224, 224), (3, 3, 64, 256), (2, 3, 227, 290))  # the last is larger than the windows of MViTv2
SMALL = ((1, 3, 33, 64), (1, 3, 224, 100))  # the last feature maps are smaller than a window


class Detector(nn.Module):
    """Model with the interface of a detector: a backbone and ``extract_feat``."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def extract_feat(self, x):
        return self.backbone(x)


# The exporters are tested for one form of each architecture, TorchScript for all forms. `make test` runs one case of
# each exporter except ONNX, which requires additional packages.
ARCHITECTURES = ('mpvit', 'dinov2', 'dinov2_reg', 'dinov3', 'vitdet', 'vitae_s', 'mvitv2_windows', 'scalablevit')
OPTIONS = dict(dinov2_reg=dict(interpolate_offset=0.0, interpolate_antialias=True, num_register_tokens=2))
FAST_CASES = [('vitdet', 'torchscript'), ('dinov2', 'exported-program')]
CASES = [('vitdet', 'torchscript')]
CASES += [(form, name) for form in ARCHITECTURES for name in FORMATS if name != 'torchscript']


def run_in_subprocess(function, *arguments):
    """Runs a function of this file in another process, since exporters keep up to 400 MB."""
    command = f'import test_export; test_export.{function}(*{arguments!r})'
    path = os.pathsep.join(path for path in sys.path if path)
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=path)
    subprocess.run([sys.executable, '-c', command], env=env, check=True)


@pytest.mark.parametrize(
    'form, name',
    [pytest.param(*case, marks=[] if case in FAST_CASES else pytest.mark.slow) for case in CASES],
)
def test_dynamic_export_equals_model(form, name, tmp_path):
    if name == 'onnx':
        run_in_subprocess('check_export', form, name, str(tmp_path))
    else:
        check_export(form, name, tmp_path)


@pytest.mark.slow
def test_torchscript_of_all_forms_equals_model(tmp_path):
    run_in_subprocess('check_torchscript', str(tmp_path))


def check_torchscript(folder):
    for form in FORMS:
        print(form, flush=True)  # names the form that fails
        check_export(form, 'torchscript', folder)


def check_export(form, name, folder):
    """Exports a backbone for all sizes and compares its outputs with those of the model."""
    torch._dynamo.reset()
    backbone = slim(form.split('_reg')[0], **OPTIONS.get(form, {})).eval()
    model = ExportModel(Detector(backbone.requires_grad_(False)))
    with torch.no_grad():
        run = EXPORTERS[name](model, torch.randn(TRACE_SHAPE), True, Path(folder, 'file'), 18)
        # An exported program has a minimum size, which the exporter prints.
        for shape in CHECK_SHAPES if name == 'exported-program' else (*SIZES, *SMALL):
            x = torch.randn(shape)
            assert relative_error(run(x), model(x)) < TOLERANCE, shape


@pytest.mark.slow
@pytest.mark.parametrize('opset', [18, 21])
def test_onnx_input_and_output_names(opset, tmp_path):
    run_in_subprocess('check_names', opset, str(tmp_path / 'vit.onnx'))


def check_names(opset, file):
    """Exports a ViT and checks the names of the inputs and outputs of the file."""
    import onnxruntime

    model = ExportModel(Detector(slim('vit', out_indices=(0, 3)).eval()))
    EXPORTERS['onnx'](model, torch.randn(TRACE_SHAPE), True, Path(file), opset)
    session = onnxruntime.InferenceSession(file)
    (images,) = session.get_inputs()
    assert (images.name, images.shape) == ('images', ['batch', 3, 'height', 'width'])
    assert [output.name for output in session.get_outputs()] == ['map0', 'map1']


@pytest.mark.parametrize('size', [1, 3, (2, 6)])
@pytest.mark.parametrize('shape', [(2, 3, 7, 12), (1, 1, 6, 6), (1, 2, 5, 2)])
def test_adaptive_pool_equals_torch(size, shape):
    x = torch.randn(shape)
    pairs = (size, size) if isinstance(size, int) else size
    torch.testing.assert_close(AdaptivePool(pairs)(x), nn.AdaptiveAvgPool2d(size)(x))


CLASSIFIER = 'configs/vit/plainvit-mini_mini-classes.py'
UPERNET = 'configs/vit/plainvit-mini_mln_upernet_mini-coco.py'
SEMANTIC_FPN = 'configs/scalablevit/scalablevit-mini_fpn_mini-coco.py'
VITDET = 'configs/vitdet/mask-rcnn_plainvit-mini_mini-coco.py'


@pytest.fixture
def export(workspace, monkeypatch, capsys):
    """Returns a function that runs the tool in this process, checks its exit code and returns its output."""
    monkeypatch.chdir(workspace)

    def export(arguments, fails=False):
        monkeypatch.setattr(sys, 'argv', ['export.py', *arguments.split()])
        code = 0
        try:
            main()
        except SystemExit as error:
            code = error.code
        output = ''.join(capsys.readouterr())
        assert (code != 0) == fails, output
        return output

    return export


slow = pytest.mark.slow


@pytest.mark.parametrize(
    'config, file',
    [
        (SEMANTIC_FPN, 's.pt'),
        pytest.param(CLASSIFIER, 'c.onnx', marks=slow),
        pytest.param(UPERNET, 'u.onnx', marks=slow),
        pytest.param(VITDET, 'd.pt2', marks=slow),
    ],
)
def test_export_of_models_in_the_zoo(run, workspace, config, file):
    """Classifiers and segmentors are exported as a whole, detectors up to the neck."""
    name = dict(onnx='onnx', pt='torchscript', pt2='exported-program')[file.rpartition('.')[2]]
    output = run(f'python tools/deployment/export.py {config} --format {name} --dynamic --out exported/{file}')
    assert output.count('relative error') == 3 and 'the weights are random' in output
    assert file in [path.name for path in (workspace / 'exported').iterdir()]
    if file == 'u.onnx':
        import onnxruntime

        session = onnxruntime.InferenceSession(workspace / 'exported' / file)
        (logits,) = session.run(None, {'images': torch.randn(1, 3, 100, 75).numpy()})
        assert logits.shape[2:] == (100, 75) and session.get_outputs()[0].name == 'logits'


def test_export_with_checkpoint_and_fixed_size(export, workspace):
    model = load_model(CLASSIFIER)
    save(model.state_dict(), workspace / 'classifier.pth', overwrite=True)
    export(f'{CLASSIFIER} classifier.pth --format torchscript --shape 64 64 --out exported/fixed.pt')
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (logits,) = torch.jit.load(workspace / 'exported/fixed.pt')(x)
        torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-4)
    message = export(f'{UPERNET} classifier.pth --format torchscript --dynamic --out exported/no.pt', fails=True)
    assert 'classifier.pth: does not fit the config: missing key auxiliary_head.' in message
    assert not (workspace / 'exported/no.pt').exists()


@pytest.mark.parametrize(
    'arguments, message',
    [
        ('--format onnx --out a.onnx', 'give either --dynamic or --shape H W'),
        ('--format onnx --dynamic --shape 64 64 --out a.onnx', 'give either --dynamic or --shape H W'),
        ('--format onnx --shape 16 64 --out a.onnx', 'H and W must be at least 32 pixels, got [16, 64]'),
        ('--format onnx --dynamic --out a.pt', 'the suffix for onnx must be .onnx, got a.pt'),
        ('--format onnx --dynamic --opset 11 --out a.onnx', '--opset must be 18 to 21, got 11'),
        ('--format torchscript --dynamic --out taken.pt', 'taken.pt exists already'),
        ('nowhere.pth --format torchscript --dynamic --out a.pt', 'nowhere.pth: no such checkpoint file'),
    ],
)
def test_invalid_arguments(export, workspace, arguments, message):
    (workspace / 'taken.pt').touch()
    assert message in export(f'{CLASSIFIER} {arguments}', fails=True)
