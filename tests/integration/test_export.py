"""tools/deployment/export.py: every backbone in every format, one file for every size."""

import sys

import pytest
import torch
from export import CHECKED, EXPORTERS, FORMATS, TOLERANCE, TRACED, AdaptivePool, Exported, error_of, main
from forms import FORMS, slim
from torch import nn

from mmvitzoo.checkpoints import save
from mmvitzoo.inference import load_model

SIZES = ((1, 3, 224, 224), (3, 3, 256, 448), (2, 3, 227, 373))
SMALL = ((1, 3, 33, 64), (1, 3, 224, 100))  # less than a window in the last stages


class Detector(nn.Module):
    """A backbone where the tool looks for one."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def extract_feat(self, x):
        return self.backbone(x)


# The slower exporters make what differs in kind, a tracer makes all. One of each stays in `make test`;
# ONNX needs packages of its own.
KINDS = ('mpvit', 'vit', 'vitdet', 'vitae_s', 'mvitv2_windows', 'scalablevit')
QUICK = [('vitdet', 'torchscript'), ('vit', 'exported-program')]
CASES = [(form, 'torchscript') for form in FORMS]
CASES += [(form, name) for form in KINDS for name in FORMATS if name != 'torchscript']


@pytest.mark.parametrize(
    'form, name',
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_one_file_for_every_size(form, name, tmp_path):
    torch._dynamo.reset()
    model = Exported(Detector(slim(form).eval().requires_grad_(False)))
    with torch.no_grad():
        run = EXPORTERS[name](model, torch.randn(TRACED), True, tmp_path / 'file', 18)
        # The exporter says the least size that an exported program takes.
        for shape in CHECKED if name == 'exported-program' else (*SIZES, *SMALL):
            x = torch.randn(shape)
            assert error_of(run(x), model(x)) < TOLERANCE, shape


@pytest.mark.slow
@pytest.mark.parametrize('opset', [18, 21])
def test_names_of_onnx(opset, tmp_path):
    import onnxruntime

    model = Exported(Detector(slim('vit', out_indices=(0, 3)).eval()))
    EXPORTERS['onnx'](model, torch.randn(TRACED), True, tmp_path / 'vit.onnx', opset)
    session = onnxruntime.InferenceSession(tmp_path / 'vit.onnx')
    (images,) = session.get_inputs()
    assert (images.name, images.shape) == ('images', ['batch', 3, 'height', 'width'])
    assert [output.name for output in session.get_outputs()] == ['map0', 'map1']


@pytest.mark.parametrize('size', [1, 3, (2, 6)])
@pytest.mark.parametrize('shape', [(2, 3, 7, 12), (1, 1, 6, 6), (1, 2, 5, 2)])
def test_adaptive_pool(size, shape):
    x = torch.randn(shape)
    pairs = (size, size) if isinstance(size, int) else size
    torch.testing.assert_close(AdaptivePool(pairs)(x), nn.AdaptiveAvgPool2d(size)(x))


CLASSIFIER = 'configs/vit/plainvit-mini_mini-classes.py'
UPERNET = 'configs/vit/plainvit-mini_mln_upernet_mini-coco.py'
SEMANTIC_FPN = 'configs/scalablevit/scalablevit-mini_fpn_mini-coco.py'
VITDET = 'configs/vitdet/mask-rcnn_plainvit-mini_mini-coco.py'


@pytest.fixture
def export(workspace, monkeypatch, capsys):
    """Runs the tool in this process; returns what it printed, fails the test if it failed."""
    monkeypatch.chdir(workspace)

    def export(arguments, fails=False):
        monkeypatch.setattr(sys, 'argv', ['export.py', *arguments.split()])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
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
def test_models(run, workspace, config, file):
    """Whole classifiers and segmentors, detectors up to their necks."""
    name = dict(onnx='onnx', pt='torchscript', pt2='exported-program')[file.rpartition('.')[2]]
    output = run(f'python tools/deployment/export.py {config} --format {name} --dynamic --out exported/{file}')
    assert output.count('differs from PyTorch by') == 3 and 'the weights are random' in output
    assert file in [path.name for path in (workspace / 'exported').iterdir()]
    if file == 'u.onnx':
        import onnxruntime

        session = onnxruntime.InferenceSession(workspace / 'exported' / file)
        (logits,) = session.run(None, {'images': torch.randn(1, 3, 100, 75).numpy()})
        assert logits.shape[2:] == (100, 75) and session.get_outputs()[0].name == 'logits'


def test_checkpoint_and_fixed_size(export, workspace):
    model = load_model(CLASSIFIER)
    save(model.state_dict(), workspace / 'classifier.pth', overwrite=True)
    export(f'{CLASSIFIER} classifier.pth --format torchscript --shape 64 64 --out exported/fixed.pt')
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (logits,) = torch.jit.load(workspace / 'exported/fixed.pt')(x)
        torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-4)
    message = export(f'{UPERNET} classifier.pth --format torchscript --dynamic --out exported/no.pt', fails=True)
    assert 'classifier.pth: does not fit the config: lacks auxiliary_head.' in message
    assert not (workspace / 'exported/no.pt').exists()


@pytest.mark.parametrize(
    'arguments, message',
    [
        ('--format onnx --out a.onnx', 'either --dynamic or --shape H W'),
        ('--format onnx --dynamic --shape 64 64 --out a.onnx', 'either --dynamic or --shape H W'),
        ('--format onnx --shape 16 64 --out a.onnx', 'at least 32 pixels a side, got [16, 64]'),
        ('--format onnx --dynamic --out a.pt', 'files of onnx end in .onnx, got a.pt'),
        ('--format onnx --dynamic --opset 11 --out a.onnx', '--opset is 18 to 21, got 11'),
        ('--format torchscript --dynamic --out taken.pt', 'taken.pt exists already'),
        ('nowhere.pth --format torchscript --dynamic --out a.pt', 'nowhere.pth: no such checkpoint file'),
    ],
)
def test_wrong_arguments(export, workspace, arguments, message):
    (workspace / 'taken.pt').touch()
    assert message in export(f'{CLASSIFIER} {arguments}', fails=True)
