"""Layouts of PlainViT that no reference case has: trainings, toolboxes, towers, names in memory, and refused files."""

import re
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from forms import build_converted
from mmengine.registry import MODELS
from mmpretrain.models import DeiT3
from mmpretrain.models import VisionTransformer as MMPretrainViT
from torchvision.models import VisionTransformer

from mmvitzoo.checkpoints import CheckpointError, convert, export, load, load_pretrained
from mmvitzoo.models import PlainViT

ROOT = Path(__file__).resolve().parents[3]
ARCH = dict(embed_dims=64, num_layers=2, num_heads=2, mlp_ratio=2)


def plain_vit(**kwargs):
    torch.manual_seed(0)
    kwargs = {'arch': ARCH, 'img_size': 64, **kwargs}
    model = PlainViT(**kwargs).eval()
    for value in model.parameters():
        value.data += 0.1 * torch.randn_like(value)
    return model


def renamed(state_dict, *names):
    """Replaces parts of keys, each a regular expression with its replacement."""
    for pattern, name in names:
        state_dict = {re.sub(pattern, name, key): value for key, value in state_dict.items()}
    return state_dict


def under(prefix, state_dict):
    return {prefix + key: value for key, value in state_dict.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def official_dinov2(**kwargs):
    """The authors' names, and the weights in this package's."""
    weights = plain_vit(layer_scale_init_value=1.0, num_register_tokens=3, **kwargs).state_dict()
    theirs = {key.replace('reg_token', 'register_tokens'): value for key, value in weights.items()}
    return {**theirs, 'mask_token': torch.zeros(1, 64)}, weights


@pytest.mark.parametrize('prefix', ['teacher.backbone.', 'backbone.', 'vision_encoder.'])
@pytest.mark.parametrize('in_chunks', [True, False])
def test_trainings_of_dinov2(prefix, in_chunks):
    """Blocks may be in chunks, whose numbers count over all of them. Students, heads and losses are left out."""
    theirs, weights = official_dinov2()
    if in_chunks:
        theirs = renamed(theirs, (r'blocks\.(\d)', r'blocks.\1.\1'))
    others = {'student.backbone.cls_token': torch.zeros(1), 'dino_head.mlp.0.weight': torch.ones(1)}
    result = convert({**under(prefix, theirs), **others})
    assert result.source == 'dinov2' and result.backbone_cfg['num_register_tokens'] == 3
    assert_same(result.backbone, dict(weights))
    assert others.keys() < result.dropped.keys() and result.state_dict.keys() == under('backbone.', weights).keys()


def test_trainings_of_dino_and_ibot(tmp_path):
    """The teacher is read unless the key tells otherwise; positions are resized as DINO does."""
    model = plain_vit()
    head = {'head.mlp.0.weight': torch.ones(2, 2), 'head.last_layer.weight_v': torch.ones(2, 2)}
    teacher = {**under('backbone.', model.state_dict()), 'backbone.masked_embed': torch.ones(1, 64), **head}
    content = dict(student=under('module.', {**teacher, 'backbone.cls_token': torch.ones(1, 1, 64)}), teacher=teacher)
    torch.save(dict(content, epoch=3), tmp_path / 'a.pth')
    result = convert(load(tmp_path / 'a.pth'))
    assert result.source == 'dino' and result.backbone_cfg['interpolate_offset'] == 0.1
    assert_same(result.backbone, dict(model.state_dict()))
    assert torch.equal(convert(load(tmp_path / 'a.pth', 'student')).backbone['cls_token'], torch.ones(1, 1, 64))


def test_trainings_of_mocov3(tmp_path):
    """Both encoders are in a file. ViT-S has 12 heads, which no weight tells."""
    with torch.no_grad():
        model = PlainViT(dict(ARCH, embed_dims=384, num_heads=12), img_size=32)
    head = {'head.0.weight': torch.ones(2, 2), 'head.1.bias': torch.ones(2)}
    base = {**model.state_dict(), **head}
    momentum = {**base, 'cls_token': torch.ones(1, 1, 384)}
    weights = {
        **under('base_encoder.', base),
        **under('momentum_encoder.', momentum),
        'predictor.0.weight': torch.ones(1),
    }
    torch.save(dict(state_dict=under('module.', weights)), tmp_path / 'a.pth')
    result = convert(load(tmp_path / 'a.pth'))
    assert result.source == 'mocov3' and result.arch['num_heads'] == 12 and not result.assumed
    assert_same(result.backbone, dict(model.state_dict()))
    other = convert(load(tmp_path / 'a.pth', 'momentum_encoder'))
    assert other.source == 'mocov3' and torch.equal(other.backbone['cls_token'], torch.ones(1, 1, 384))


def test_torchvision():
    torch.manual_seed(0)
    peer = VisionTransformer(32, 16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=96, num_classes=3).eval()
    torch.nn.init.normal_(peer.heads.head.weight)
    result = convert(peer.state_dict())
    assert result.source == 'torchvision' and result.assumed == dict(num_heads=1)
    model = MODELS.build(dict(result.backbone_cfg, arch=dict(result.arch, num_heads=4), out_type='cls_token')).eval()
    model.load_state_dict(result.backbone)
    head = torch.nn.Linear(64, 3)
    head.load_state_dict({leaf: result.state_dict[f'head.fc.{leaf}'] for leaf in ('weight', 'bias')})
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(head(model(image)[0]), peer(image), atol=1e-5, rtol=1e-5)


def google_arrays(dim=48, heads=4, hidden=64):
    """Google's names and shapes."""
    rng = np.random.RandomState(0)
    shapes = {
        'cls': (1, 1, dim),
        'Transformer/posembed_input/pos_embedding': (1, 5, dim),
        'embedding/kernel': (16, 16, 3, dim),
        'embedding/bias': (dim,),
        'Transformer/encoder_norm/scale': (dim,),
        'Transformer/encoder_norm/bias': (dim,),
        'head/kernel': (dim, 3),
        'head/bias': (3,),
    }
    for block in range(2):
        prefix = f'Transformer/encoderblock_{block}'
        for name in ('query', 'key', 'value'):
            shapes[f'{prefix}/MultiHeadDotProductAttention_1/{name}/kernel'] = (dim, heads, dim // heads)
            shapes[f'{prefix}/MultiHeadDotProductAttention_1/{name}/bias'] = (heads, dim // heads)
        shapes[f'{prefix}/MultiHeadDotProductAttention_1/out/kernel'] = (heads, dim // heads, dim)
        shapes[f'{prefix}/MultiHeadDotProductAttention_1/out/bias'] = (dim,)
        for i, size in enumerate(((dim, hidden), (hidden, dim))):
            shapes[f'{prefix}/MlpBlock_3/Dense_{i}/kernel'] = size
            shapes[f'{prefix}/MlpBlock_3/Dense_{i}/bias'] = size[1:]
            shapes[f'{prefix}/LayerNorm_{2 * i}/scale'] = shapes[f'{prefix}/LayerNorm_{2 * i}/bias'] = (dim,)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def test_google_archives(tmp_path):
    """timm reads them as well. The number of heads is in the shapes."""
    np.savez(tmp_path / 'a.npz', **google_arrays())
    peer = timm.create_model(
        'vit_tiny_patch16_224', img_size=32, embed_dim=48, num_heads=4, depth=2, mlp_ratio=64 / 48, num_classes=3
    )
    peer.load_pretrained(str(tmp_path / 'a.npz'))
    result = convert(load(tmp_path / 'a.npz'))
    assert result.source == 'google' and result.arch['num_heads'] == 4 and result.assumed == dict(act='gelu')
    assert_same(export(result.state_dict, 'plainvit', 'timm'), peer.state_dict())
    MODELS.build(result.backbone_cfg).load_state_dict(result.backbone)
    hybrid = {**load(tmp_path / 'a.npz'), 'conv_root/kernel': torch.ones(1)}
    with pytest.raises(CheckpointError, match='plainvit/google: .* belongs to a hybrid with a ResNet'):
        convert(hybrid)


IN_MEMORY = {
    'dinov2_hf_swiglu': [
        (r'attention\.attention\.(\w)\w+', r'attention.\1_proj'),
        (r'attention\.output\.dense', 'attention.o_proj'),
        (r'mlp\.weights_out', 'mlp.down_proj'),
    ],
    'vit_hf_small': [
        (r'attention\.attention\.(\w)\w+', r'attention.\1_proj'),
        (r'attention\.output\.dense', 'attention.o_proj'),
        (r'intermediate\.dense', 'mlp.fc1'),
        (r'output\.dense', 'mlp.fc2'),
        (r'encoder\.layer\.', 'layers.'),
    ],
    'dinov3_hf_swiglu': [(r'^layer\.', 'model.layer.')],
}


@pytest.mark.parametrize('name', IN_MEMORY)
def test_names_in_the_memory_of_transformers(load_golden, name):
    """transformers 5 has other names in memory than in files."""
    theirs = load_golden(name).state_dict
    in_memory = renamed(theirs, *IN_MEMORY[name])
    for key in [key for key in in_memory if 'weights_in' in key]:
        gate, value = in_memory.pop(key).chunk(2)
        in_memory[key.replace('weights_in', 'gate_proj')] = gate
        in_memory[key.replace('weights_in', 'up_proj')] = value
    assert not theirs.keys() >= in_memory.keys()
    assert_same(convert(in_memory).state_dict, convert(theirs).state_dict)


def test_distilled_deit_of_hugging_face(load_golden):
    theirs = renamed(load_golden('vit_hf_small').state_dict, (r'^vit\.', 'deit.'))
    positions = theirs['deit.embeddings.position_embeddings']
    distilled = {
        **theirs,
        'deit.embeddings.distillation_token': torch.ones(1, 1, 128),
        'deit.embeddings.position_embeddings': torch.cat([positions[:, :1], positions[:, :1] + 1, positions[:, 1:]], 1),
    }
    assert_same(convert(distilled).backbone, convert(theirs).backbone)


@pytest.mark.parametrize(
    'layer_cfgs, kwargs',
    [(dict(), dict()), (dict(ffn_type='swiglu_fused'), dict(ffn_type='swiglu'))],
)
def test_dinov2_of_mmpretrain(layer_cfgs, kwargs):
    arch = dict(embed_dims=192, num_layers=2, num_heads=3, feedforward_channels=768)
    torch.manual_seed(0)
    options = dict(layer_scale_init_value=1.0, layer_cfgs=layer_cfgs, out_type='featmap')
    peer = MMPretrainViT(arch, img_size=42, patch_size=14, **options)
    peer.eval()  # which returns nothing
    for value in peer.parameters():
        value.data += 0.1 * torch.randn_like(value)
    result = convert(peer.state_dict())
    assert result.source == 'mmpretrain' and result.backbone_cfg.get('ffn_type', 'mlp') == kwargs.get('ffn_type', 'mlp')
    model = MODELS.build(result.backbone_cfg).eval()
    model.load_state_dict(result.backbone)
    image = torch.randn(1, 3, 42, 56)
    with torch.no_grad():
        ours, theirs = model(image)[0], peer(image)[0]
    assert (ours - theirs).norm() < 3e-6 * theirs.norm()
    back = export({f'backbone.{key}': value for key, value in result.backbone.items()}, 'plainvit', 'mmpretrain')
    assert_same(back, under('backbone.', peer.state_dict()))


def test_deit3_of_mmpretrain():
    """Its class reads ``ln1`` twice, unlike the authors, so both norms are equal here."""
    arch = dict(embed_dims=64, num_layers=2, num_heads=1, feedforward_channels=128)
    torch.manual_seed(0)
    peer = DeiT3(arch, img_size=64, out_type='cls_token')
    peer.eval()
    for value in peer.parameters():
        value.data += 0.1 * torch.randn_like(value)
    for layer in peer.layers:
        layer.ln2.load_state_dict(layer.ln1.state_dict())
    result = convert(peer.state_dict())
    model = MODELS.build(dict(result.backbone_cfg, out_type='cls_token')).eval()
    model.load_state_dict(result.backbone)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(image)[0], peer(image)[0], atol=1e-5, rtol=1e-5)


def test_towers_of_open_clip():
    """timm's towers stand in a model with a text encoder; CLIP's own may stand alone in Hugging Face's names."""
    tower = plain_vit(with_cls_token=False)
    extra = {'attn_pool.latent': torch.ones(1, 1, 64), 'norm.weight': torch.ones(64)}
    theirs = {**under('visual.trunk.', {**tower.state_dict(), **extra}), 'text.positional_embedding': torch.ones(1)}
    result = convert(theirs)
    assert result.source == 'openclip-timm' and set(result.assumed) == {'num_heads', 'act'}
    assert set(result.dropped) == {'visual.trunk.attn_pool.latent', 'text.positional_embedding'}
    with pytest.raises(CheckpointError, match='openclip-timm: visual.trunk.other is no weight of PlainViT'):
        convert({**theirs, 'visual.trunk.other': torch.ones(1)})


def test_activation_is_assumed_unless_given(load_golden):
    theirs = load_golden('openclip_visual_small').state_dict
    result = convert(theirs)
    assert result.assumed['act'] == 'gelu' and result.note == 'weights that OpenAI published need act=quick_gelu'
    result = convert(theirs, act='quick_gelu')
    assert 'act' not in result.assumed and result.backbone_cfg['act'] == 'quick_gelu'
    with pytest.raises(CheckpointError, match="act of a plainvit is one of gelu, .*, got 'relu' for plainvit"):
        convert(theirs, act='relu')


def test_vision_model_alone(load_golden):
    theirs = load_golden('clip_vision_small').state_dict
    alone = {key[len('vision_model.') :]: value for key, value in theirs.items() if key.startswith('vision_model.')}
    assert_same(convert(alone).backbone, convert(theirs).backbone)


@pytest.mark.parametrize(
    'keys, message',
    [
        (('storage_tokens', 'blocks.0.attn.wq.weight'), 'plainvit/sapiens2: storage_tokens belongs to Sapiens2'),
        (('norm_pre.weight', 'attn_pool.latent', 'norm.weight'), 'beside attn_pool, belongs to no CLIP'),
        (('norm_pre.weight',), 'norm_pre without norm, .* belongs to no CLIP'),
        (('norm_pre.weight', 'attn_pool.latent', 'pos_embed'), '.*pos_embed has .* dimensions'),
        (('fc_norm.weight',), "fc_norm .* belongs to timm's post-norm blocks"),
        (('rope.freqs', 'blocks.0.gamma_1'), 'has no rule for 1 keys: blocks.0.gamma_1'),
    ],
)
def test_models_with_other_blocks_are_refused(keys, message):
    block = {'patch_embed.proj.weight': torch.ones(4, 3, 1, 1), 'blocks.0.attn.qkv.weight': torch.ones(12, 4)}
    with pytest.raises(CheckpointError, match=message):
        convert({**{key: torch.ones(4) for key in keys}, **block})


def dinov3(**kwargs):
    return plain_vit(pos_type='rope', num_register_tokens=4, layer_scale_init_value=1.0, norm_outputs=True, **kwargs)


def official_dinov3():
    weights = dinov3().state_dict()
    return renamed(weights, ('reg_token', 'storage_tokens'), (r'^rope\.', 'rope_embed.'))


def test_license_is_logged(tmp_path, monkeypatch):
    from mmvitzoo.checkpoints import pretrained

    torch.save(official_dinov3(), tmp_path / 'a.pth')
    lines = []
    monkeypatch.setattr(pretrained, 'print_log', lambda line, logger: lines.append(line))
    load_pretrained(dinov3(norm_eps=1e-5), str(tmp_path / 'a.pth'))
    assert any('under the DINOv3 License' in line and 'keeps the license of its source' in line for line in lines)


@pytest.mark.parametrize(
    'theirs, model, message',
    [
        (
            lambda: official_dinov2()[0],
            lambda: plain_vit(layer_scale_init_value=1.0),
            'belong to num_register_tokens=3, the model has num_register_tokens=0',
        ),
        (
            official_dinov3,
            lambda: plain_vit(num_register_tokens=4, layer_scale_init_value=1.0),
            "belong to pos_type='rope', the model has pos_type='learned'",
        ),
        (
            lambda: official_dinov2(ffn_type='swiglu')[0],
            lambda: plain_vit(layer_scale_init_value=1.0, num_register_tokens=3),
            "belong to ffn_type='swiglu', the model has ffn_type='mlp'",
        ),
        (
            lambda: plain_vit(in_channels=4).state_dict(),
            plain_vit,
            'belong to in_channels=4, the model has in_channels=3',
        ),
        (
            lambda: plain_vit(with_cls_token=False).state_dict(),
            plain_vit,
            'have no class token, the model has with_cls_token=True',
        ),
        (
            lambda: plain_vit(layer_scale_init_value=1.0).state_dict(),
            plain_vit,
            'belong to layer_scale_init_value=1e-05, the model has layer_scale_init_value=0.0',
        ),
        (
            lambda: plain_vit().state_dict(),
            lambda: plain_vit(qkv_bias=False),
            'belong to qkv_bias=True, the model has qkv_bias=False',
        ),
        (
            lambda: plain_vit(arch=dict(ARCH, embed_dims=128)).state_dict(),
            plain_vit,
            'holds PlainViT of arch .*, which the model is not',
        ),
    ],
)
def test_files_of_other_models_are_refused(tmp_path, theirs, model, message):
    torch.save(theirs(), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=message) as error:
        load_pretrained(model(), str(tmp_path / 'a.pth'))
    assert str(error.value).startswith(f'{tmp_path}/a.pth: ') and '\n' not in str(error.value)


@pytest.mark.slow  # builds 206 models
def test_coverage_of_timm():
    """Weights that timm publishes load strictly by the config of the converter, except those that a page lists."""
    page = (ROOT / 'docs' / 'converters.md').read_text()
    rows = re.findall(r'^\| (`(?:vit|deit)_.+`) \| ([0-9]+) \|', page, re.M)
    names = timm.list_models(['vit_*', 'deit*'], pretrained=True)
    number, listed = Counter(name.split('.')[0] for name in names), Counter()
    for name, count in number.items():
        row = [names for names, _ in rows if any(fnmatch(name, x) for x in re.findall('`(.+?)`', names))]
        listed.update(dict.fromkeys(row, count))
        with torch.device('meta'):
            model = timm.create_model(name)
        try:
            result = convert(model.state_dict())
        except CheckpointError:
            assert row, name
        else:
            build_converted(result)
            assert not row or 'RoPE-ViT with axial and learned positions' in result.note, name
    if len(names) == 370:  # of the timm that the page names
        assert {names: int(count) for names, count in rows} == listed
        assert f'{370 - sum(listed.values())} of them' in page
