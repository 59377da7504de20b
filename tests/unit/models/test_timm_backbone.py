"""Models of timm as backbones: timm's own outputs, and the contract of this package."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_checkpoint
from timm.models import group_parameters
from torch import nn

from mmvitzoo.checkpoints import CheckpointError
from mmvitzoo.checkpoints.conversion import convert_for
from mmvitzoo.models import TimmBackbone
from mmvitzoo.models.backbones import timm_backbone

SWIN = dict(
    model_name='swinv2_tiny_window8_256', window_size=2, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)
)
CONVNEXT = dict(model_name='convnextv2_atto', depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))
VIT = dict(model_name='vit_tiny_patch16_224', img_size=64, embed_dim=48, depth=3, num_heads=3)
EVA = dict(model_name='eva02_tiny_patch14_224', img_size=56, embed_dim=48, depth=2, num_heads=3)
BEIT = dict(model_name='beit_base_patch16_224', img_size=(64, 96), embed_dim=48, depth=2, num_heads=3)
FORMS = dict(swin=SWIN, convnext=CONVNEXT, vit=VIT, eva=EVA, beit=BEIT)
every_form = pytest.mark.parametrize('form', FORMS)


def fill(model):
    """Gives all weights random values; timm initializes some with zero."""
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn_like(value)
            if value.dim() == 1:
                value.copy_(0.5 + 0.1 * noise)
            else:
                value.copy_(0.2 * noise if value.shape[0] == 1 else noise / value[0].numel() ** 0.5)
    return model


def slim(form, **kwargs):
    torch.manual_seed(0)
    return fill(TimmBackbone(**{**FORMS[form], **kwargs}))


def peer(backbone, **kwargs):
    """Returns timm's own feature extractor with the weights of a backbone."""
    kwargs = {**backbone.timm_args, **kwargs}
    whole = timm.create_model(backbone.model_name, **kwargs)
    features = timm.create_model(
        backbone.model_name, features_only=True, out_indices=list(backbone.out_indices), **kwargs
    )
    weights = {**whole.state_dict(), **backbone.model.state_dict()}
    whole.load_state_dict(resample(whole, weights))
    # Names of a FeatureListNet are flattened: stages_0 for stages.0.
    names = {key.replace('.', '_'): value for key, value in whole.state_dict().items()}
    features.load_state_dict(
        {key: names[key.removeprefix('model.').replace('.', '_')] for key in features.state_dict()}
    )
    return features.eval()


def resample(whole, weights):
    """Resizes the table of positions to the grid of the model."""
    own = whole.state_dict()
    if 'pos_embed' in own and own['pos_embed'].dim() == 3 and own['pos_embed'].shape != weights['pos_embed'].shape:
        weights['pos_embed'] = timm.layers.resample_abs_pos_embed(
            weights['pos_embed'],
            whole.patch_embed.grid_size,
            num_prefix_tokens=0 if whole.no_embed_class else whole.num_prefix_tokens,
        )
    return weights


def as_nchw(features, maps):
    return [x.permute(0, 3, 1, 2) if features.output_fmt == timm.layers.Format.NHWC else x for x in maps]


def assert_equals_timm(backbone, size, atol=0.0, **kwargs):
    """Compares with timm's feature extractor on the padded image."""
    x = torch.randn(2, backbone.in_channels, *size)
    height, width = (-(-side // backbone.multiple) * backbone.multiple for side in size)
    padded = F.pad(x, (0, width - size[1], 0, height - size[0]))
    features = peer(backbone, **kwargs)
    with torch.no_grad():
        maps, expected = backbone.eval()(x), as_nchw(features, features(padded))
    assert len(maps) == len(expected) == len(backbone.out_indices)
    for i, y, theirs in zip(backbone.out_indices, maps, expected):
        stride = backbone.strides[i]
        assert y.shape == (2, backbone.out_channels[i], height // stride, width // stride) and y.is_contiguous()
        torch.testing.assert_close(y, theirs, rtol=atol, atol=atol)


@every_form
def test_equals_timm_at_its_own_size(form):
    size = FORMS[form].get('img_size', 256 if form == 'swin' else 64)
    fixed = dict(dynamic_img_size=False) if form in ('swin', 'vit', 'eva') else {}
    assert_equals_timm(slim(form), size if isinstance(size, tuple) else (size, size), **fixed)


@pytest.mark.parametrize('form', ['vit', 'eva'])
def test_equals_timm_built_for_another_size(form):
    patch = slim(form).multiple
    kwargs = dict(img_size=(5 * patch, 7 * patch), dynamic_img_size=False)
    assert_equals_timm(slim(form), (4 * patch + 3, 7 * patch - 1), 1e-5, **kwargs)


def test_swin_equals_timm_built_for_another_size():
    assert_equals_timm(slim('swin'), (70, 90), 1e-5, img_size=(96, 96), dynamic_img_size=False)


@pytest.mark.parametrize('form, size', [('convnext', (70, 90)), ('beit', (50, 81))])
def test_padded_image(form, size):
    assert_equals_timm(slim(form), size)


def test_default_maps_are_four_stages_or_the_last_block():
    assert slim('swin').out_indices == (0, 1, 2, 3) and slim('vit').out_indices == (2,)
    assert TimmBackbone('resnet18').out_indices == (1, 2, 3, 4)  # from stride 4


def test_layers_after_the_last_index_are_not_built():
    full, model = slim('swin'), slim('swin', out_indices=(0, 1))
    assert len(model.model.layers) == 2 and model.multiple == 32
    missing, _ = model.load_state_dict(full.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    assert not missing and all(torch.equal(a, b) for a, b in zip(model.eval()(x), full.eval()(x)))


def test_norm_outputs_equal_timm():
    model = slim('vit', norm_outputs=True, out_indices=(0, 2)).eval()
    whole = timm.create_model(model.model_name, **model.timm_args).eval()
    whole.load_state_dict(model.model.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    expected = timm.models._features.FeatureGetterNet(whole, [0, 2], norm=True)(x)
    assert all(torch.equal(a, b) for a, b in zip(model(x), expected))


def test_forward_intermediates():
    model, x = slim('swin').eval(), torch.randn(1, 3, 64, 64)
    maps = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    assert all(torch.equal(y, model(x)[i]) for y, i in zip(maps, (1, 3)))


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('swinv2_tiny_window8_256', {}),
        ('vit_tiny_patch16_224', {}),
        ('vit_small_patch14_dinov2', dict(depth=2, embed_dim=48, num_heads=3)),  # without a classifier in timm
        ('convnextv2_atto', {}),
        ('sam2_hiera_tiny', {}),
    ],
)
def test_layer_depths_are_the_groups_of_timm(name, kwargs):
    with torch.device('meta'):
        whole = timm.create_model(name, num_classes=10, **kwargs)
        model = TimmBackbone(name, out_indices=-1, **kwargs)
    groups = group_parameters(whole, whole.group_matcher(), reverse=True)
    last = max(groups.values())
    for parameter, _ in model.named_parameters():
        assert model.get_layer_depth(f'backbone.{parameter}', 'backbone.') == (
            groups[parameter[len('model.') :]],
            last + 1,
        )
    assert model.get_layer_depth('decode_head.conv_seg.weight', 'backbone.') == (last, last + 1)
    adapter = next(key for key in groups if 'qkv' in key or 'fc1' in key).rpartition('.')[0]
    assert model.get_layer_depth(f'model.{adapter}.lora_a.weight')[0] == groups[f'{adapter}.weight']


def test_model_without_group_matcher_has_a_group_for_each_stage():
    with torch.device('meta'):
        model = TimmBackbone('caformer_s18')
    depths = {name: model.get_layer_depth(name) for name, _ in model.named_parameters()}
    assert depths['model.stem.conv.weight'] == (0, 6) and depths['model.stages.2.blocks.1.norm1.weight'] == (3, 6)
    assert model.get_layer_depth('head.weight', 'backbone.') == (5, 6)


@pytest.mark.parametrize('frozen_stages', [-1, 0, 2])
def test_frozen_groups(frozen_stages):
    """In Swin V2 with blocks (1, 1, 2, 1), two groups are the first two stages."""
    model = slim('swin', frozen_stages=frozen_stages, drop_path_rate=0.5).train()
    parts = dict(patch_embed=0, **{f'layers.{i}': i + 1 for i in range(2)})
    for name, parameter in model.model.named_parameters():
        group = next((group for part, group in parts.items() if name.startswith(part)), 9)
        assert parameter.requires_grad == (group > frozen_stages), name
    modes = [model.model.layers[i].training for i in range(4)]
    assert modes == [frozen_stages < 1, frozen_stages < 2, True, True]
    assert all(m.training == mode for m, mode in zip([model.model.layers[1].blocks[0].drop_path1], modes[1:]))


def test_norm_eval():
    model = TimmBackbone('resnet18', norm_eval=True, frozen_stages=0).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms) and model.model.layer1.training


@pytest.mark.parametrize('form', ['swin', 'vit'])
def test_with_cp_gives_the_same_gradients_in_training_only(form):
    model, checkpointed = slim(form).train(), slim(form, with_cp=True).train()
    x, saved = torch.randn(2, 3, 64, 64), []
    for m in (model, checkpointed):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            loss = sum(y.square().mean() for y in m(x))
        loss.backward()
        saved.append(sum(sizes))
    assert saved[1] < 0.6 * saved[0]
    for (name, a), b in zip(model.named_parameters(), checkpointed.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    checkpointed.eval()
    assert not any(getattr(module, 'grad_checkpointing', False) for module in checkpointed.modules())


@every_form
def test_gradients_reach_every_parameter(form):
    model = slim(form).train()
    sum((y * torch.randn_like(y)).sum() for y in model(torch.randn(2, 3, 64, 90))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def assert_compiles(model, size):
    torch._dynamo.reset()
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        maps = torch.compile(model.eval(), fullgraph=True, backend='eager')(x)
        for a, b in zip(maps, model(x)):
            torch.testing.assert_close(a, b)


def test_compiles_without_graph_breaks():
    assert_compiles(slim('vit'), (64, 90))


def save_whole(form, path, **kwargs):
    """Writes a file of timm with random weights, for models of another size than the form's."""
    kwargs = {**FORMS[form], **kwargs}
    torch.manual_seed(1)
    torch.save(fill(timm.create_model(**kwargs)).state_dict(), path)
    return str(path)


def load_by_timm(model, file):
    """Lets timm load the file into its own feature extractor."""
    overlay = dict(file=file, num_classes=1000)
    return timm.create_model(
        model.model_name,
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        features_only=True,
        out_indices=list(model.out_indices),
        **model.timm_args,
    ).eval()


@pytest.mark.parametrize('in_channels', [3, 4])
@pytest.mark.parametrize('form, kwargs', [('swin', dict(window_size=4)), ('vit', dict(img_size=96)), ('eva', {})])
@torch.no_grad()
def test_file_of_timm_is_loaded_as_by_timm(form, kwargs, in_channels, tmp_path):
    """Also for another number of channels, and with positions of another size."""
    file = save_whole(form, tmp_path / 'a.pth', **kwargs)
    model = slim(form, in_channels=in_channels, init_cfg=dict(type='Pretrained', checkpoint=file)).eval()
    model.init_weights()
    features, x = load_by_timm(model, file), torch.randn(1, in_channels, 64, 64)
    size = model.multiple * -(-64 // model.multiple)
    expected = as_nchw(features, features(F.pad(x, (0, size - 64, 0, size - 64))))
    assert all(torch.equal(a, b) for a, b in zip(model(x), expected))


def test_converted_config_builds_the_model():
    model = slim('vit', in_channels=4, out_indices=(0, 2), norm_outputs=True)
    result = convert_for(model, dict(model.state_dict()))
    again = MODELS.build(result.backbone_cfg)
    again.load_state_dict(result.backbone, strict=True)
    x = torch.randn(1, 4, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(again.eval()(x), model.eval()(x)))
    assert result.description == 'vit_tiny_patch16_224, model_name=vit_tiny_patch16_224 (assumed)'


def test_names_of_the_authors_are_renamed_by_timm(tmp_path):
    """Swin's authors downsample at the end of a stage, timm at the start of the next one."""
    file = save_whole('swin', tmp_path / 'a.pth')
    theirs = {
        re.sub(r'layers\.(\d)\.downsample', lambda x: f'layers.{int(x[1]) - 1}.downsample', key): value
        for key, value in torch.load(file).items()
    }
    torch.save({'model': {f'trunk.{key}': value for key, value in theirs.items()}}, tmp_path / 'b.pth')
    model = slim('swin', init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'b.pth'), prefix='trunk'))
    model.init_weights()
    assert torch.equal(
        model.model.layers[1].downsample.reduction.weight, theirs['layers.0.downsample.reduction.weight']
    )


def test_own_checkpoints(tmp_path):
    """A backbone and a detector load their own files, a backbone also the file of a detector."""
    source, detector = slim('vit'), nn.ModuleDict(dict(backbone=slim('vit'), head=nn.Linear(2, 2)))
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    torch.save(detector.state_dict(), tmp_path / 'b.pth')
    for file, key in (('a.pth', 'model.pos_embed'), ('b.pth', 'backbone.model.pos_embed')):
        model = TimmBackbone(**VIT, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / file)))
        model.init_weights()
        assert torch.equal(model.model.pos_embed, torch.load(tmp_path / file)[key])
    target = nn.ModuleDict(dict(backbone=TimmBackbone(**VIT), head=nn.Linear(2, 2)))
    load_checkpoint(target, str(tmp_path / 'b.pth'))
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), detector.parameters()))
    shorter = nn.ModuleDict(dict(backbone=TimmBackbone(**VIT, out_indices=1), head=nn.Linear(2, 2)))
    load_checkpoint(shorter, str(tmp_path / 'b.pth'))
    assert torch.equal(shorter.backbone.model.cls_token, detector.backbone.model.cls_token)
    assert torch.equal(shorter.head.weight, detector.head.weight)
    target = nn.ModuleDict(dict(backbone=TimmBackbone(**VIT), head=nn.Linear(2, 2)))
    load_checkpoint(target, save_whole('vit', tmp_path / 'c.pth'))
    assert torch.equal(target.backbone.model.cls_token, torch.load(tmp_path / 'c.pth')['cls_token'])


def test_positions_of_another_size_are_resampled():
    source = slim('vit', out_indices=(1,))
    target = TimmBackbone(**{**VIT, 'img_size': 96}, out_indices=(1,))
    target.load_state_dict(source.state_dict())
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(target.eval()(x)[0], source.eval()(x)[0], rtol=1e-4, atol=1e-4)


def test_init_weights_keeps_what_timm_loaded_and_logs_the_license(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(timm_backbone, 'print_log', lambda line, logger: lines.append(line))
    overlay = dict(file=save_whole('vit', tmp_path / 'a.pth'))
    model = TimmBackbone(**VIT, pretrained=True, pretrained_cfg_overlay=overlay)
    model.init_weights()
    assert torch.equal(model.model.cls_token, torch.load(tmp_path / 'a.pth')['cls_token'])
    assert 'timm loaded the weights; timm names the license apache-2.0 for vit_tiny_patch16_224' in lines[-1]


def test_init_cfg_of_layers_is_not_overwritten():
    """BaseModule calls init_weights of all children, which timm's models have, too."""
    model = TimmBackbone(**VIT, init_cfg=dict(type='Constant', val=0.5, layer='Linear'))
    model.init_weights()
    assert (model.model.blocks[0].mlp.fc1.weight == 0.5).all()


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(model_name='swin2_tiny'), "has no model 'swin2_tiny'; did you mean swinv2_"),
        (dict(model_name='swin_v2_tiny'), 'did you mean swinv2_tiny_window8_256'),
        (dict(model_name='bert'), "has no model 'bert'; (did you mean|timm.list_models)"),
        (dict(model_name='vit_tiny_patch16_224.nope'), r'timm cannot build .*Invalid pretrained tag \(nope\)'),
        (dict(CONVNEXT, img_size=64), "timm cannot build convnextv2_atto: .* argument 'img_size'"),
        (dict(CONVNEXT, norm_outputs=True), 'norm_outputs applies the last norm of a model, which convnextv2_atto'),
        (dict(BEIT, img_size=(64, 90)), r'img_size of beit_base_patch16_224 is two multiples of 16, got \(64, 90\)'),
        (dict(VIT, frozen_stages=4), 'frozen_stages is a number from -1 to 3 for vit_tiny_patch16_224, got 4'),
        (dict(VIT, out_indices=(3,)), r'out_indices is .* from 0 to 2, got \(3,\)'),
        (dict(VIT, depth=5, out_indices=(0, 1, 2, 3)), 'is plain: .*neck=dict.type="SimpleFeaturePyramid"'),
        (dict(VIT, pretrained=True, init_cfg=dict(type='Pretrained')), 'pretrained=True or from init_cfg'),
        (dict(VIT, checkpoint_path='a.pth'), 'checkpoint_path is not an argument; init_cfg loads checkpoints'),
        (dict(VIT, in_chans=4), 'in_chans is not an argument; .* in_channels is'),
        (dict(model_name='twins_svt_small', with_cp=True), 'twins_svt_small has no activation checkpointing in timm'),
    ],
)
def test_wrong_arguments_are_one_line(kwargs, message):
    with pytest.raises(ValueError, match=f'^TimmBackbone: .*{message}') as error, torch.device('meta'):
        TimmBackbone(**kwargs)
    assert '\n' not in str(error.value)


def test_model_without_maps_is_one_line(monkeypatch):
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: nn.Identity())
    with pytest.raises(ValueError, match=f'vit_tiny_patch16_224 has no intermediate maps in timm {timm.__version__}'):
        TimmBackbone(**VIT)


def test_old_timm_is_one_line(monkeypatch):
    monkeypatch.setattr(timm, '__version__', '0.9.16')
    with pytest.raises(ImportError, match='TimmBackbone requires timm >= 1.0, found 0.9.16: pip install'):
        TimmBackbone(**VIT)


def test_model_of_fixed_size_names_it():
    with pytest.raises(
        ValueError, match='takes images of 64 x 96 pixels, got 96 x 96 after padding to multiples of 16'
    ):
        slim('beit')(torch.zeros(1, 3, 81, 96))


def test_fpn_on_a_plain_model_names_the_pyramid():
    from mmdet.models.necks import FPN

    neck = FPN([48] * 4, 32, 5)
    with pytest.raises(ValueError, match='the backbone returns 1 maps; .*SimpleFeaturePyramid'):
        neck(slim('vit')(torch.zeros(1, 3, 64, 64)))


@pytest.mark.parametrize(
    'change, message',
    [
        (
            lambda x: x.pop('blocks.1.attn.qkv.weight'),
            'lacks 1 weights of TimmBackbone: model.blocks.1.attn.qkv.weight',
        ),
        (lambda x: x.update({'norm.bias': x['cls_token']}), None),  # not in the backbone
        (lambda x: x.update({'cls_token': x['norm.bias']}), r'cls_token has shape \(48,\), vit_tiny_patch16_224 has'),
        (lambda x: x.update({'patch_embed.proj.weight': torch.zeros(48, 5, 16, 16)}), 'images of 5 channels'),
    ],
)
def test_wrong_checkpoints_are_one_line(change, message, tmp_path):
    weights = torch.load(save_whole('vit', tmp_path / 'a.pth'))
    change(weights)
    torch.save(weights, tmp_path / 'a.pth')
    model = TimmBackbone(**VIT, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth')))
    if message is None:
        model.init_weights()
        return
    with pytest.raises(CheckpointError, match=message) as error:
        model.init_weights()
    assert '\n' not in str(error.value)


# The architectures of the issue, as small as timm's arguments allow.
DEPTH = dict(depth=2)
SLIM = dict(depth=2, embed_dim=96, num_heads=3)
ARCHITECTURES = {
    'vit_small_patch16_dinov3': SLIM,
    'vit_small_patch16_lingbot': SLIM,
    'samvit_base_patch16': SLIM,
    'sam2_hiera_tiny': dict(stages=(1, 2, 2, 1), global_att_blocks=(4,)),
    'convnext_atto': dict(depths=(1, 1, 1, 1)),
    'convnextv2_atto': dict(depths=(1, 1, 1, 1)),
    'pvt_v2_b0': {},
    'davit_tiny': dict(depths=(1, 1, 1, 1), embed_dims=(24, 48, 96, 192)),
    'caformer_s18': {},
    'tiny_vit_5m_224': {},
    'xcit_nano_12_p16_224': DEPTH,
    'efficientvit_b0': {},
    'fastvit_t8': {},
    'nextvit_small': {},
    'mambaout_femto': dict(depths=(1, 1, 1, 1)),
    'vit_tiny_patch16_224': SLIM,
    'deit3_small_patch16_224': SLIM,
    'vit_base_patch16_siglip_224': SLIM,
    'vit_pe_spatial_tiny_patch16_512': SLIM,
    'vit_small_patch16_rope_224': SLIM,
    'swin_tiny_patch4_window7_224': dict(depths=(1, 1, 2, 1)),
    'swinv2_tiny_window8_256': dict(depths=(1, 1, 2, 1)),
    'vit_small_patch14_dinov2': SLIM,
    'vit_small_patch14_reg4_dinov2': SLIM,
    'vit_base_patch14_reg1_tipsv2': SLIM,
    'vit_base_patch16_radio_v3': SLIM,
    'eva02_tiny_patch14_224': SLIM,
    'beit_base_patch16_224': SLIM,
    'hiera_tiny_224': dict(stages=(1, 1, 2, 1)),
    'maxvit_rmlp_pico_rw_256': {},
    'mvitv2_tiny': {},
}


# Models that take one size; timm builds all but MViTv2 for any.
ONE_SIZE = ('beit_base_patch16_224', 'hiera_tiny_224', 'maxvit_rmlp_pico_rw_256', 'mvitv2_tiny')


@pytest.mark.slow
@pytest.mark.parametrize('size', [None, (256, 320), (250, 330)], ids=str)
@pytest.mark.parametrize('name', ARCHITECTURES)
def test_architectures_equal_timm(name, size):
    """At timm's own size the difference is 0; at others the peer is built for them."""
    torch.manual_seed(0)
    kwargs = dict(ARCHITECTURES[name], model_name=name)
    padded = [-(-side // 32) * 32 for side in size or ()]
    if name == 'mvitv2_tiny' and size:
        with pytest.raises(ValueError, match='takes images of 224 x 224 pixels'):
            TimmBackbone(**kwargs)(torch.zeros(1, 3, *size))
        return
    if name in ONE_SIZE and size:
        kwargs['img_size'] = [-(-side // 16) * 16 for side in size] if 'beit' in name else padded
    model = fill(TimmBackbone(**kwargs))
    fixed = dict(dynamic_img_size=False) if model.timm_args.get('dynamic_img_size') else {}
    if size is None:
        own = model.model.pretrained_cfg['input_size'][1:]
        assert_equals_timm(model, own if fixed or model.fixed_size else (256, 256), **fixed)
    elif fixed:
        patch = model.multiple
        fixed['img_size'] = [-(-side // patch) * patch for side in size]
        assert_equals_timm(model, size, 1e-4, **fixed)
    else:
        assert_equals_timm(model, size)


@pytest.mark.slow
@pytest.mark.parametrize('name', ARCHITECTURES)
def test_architectures_in_training(name):
    """Checkpointing keeps the gradients, frozen groups have none, and groups are those of timm."""
    kwargs = dict(ARCHITECTURES[name], model_name=name, frozen_stages=0)
    if name not in ONE_SIZE:
        kwargs['norm_eval'] = True
    grads = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = fill(TimmBackbone(**kwargs, with_cp=with_cp)).train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        size = model.fixed_size or (64, 96)
        sum(y.square().mean() for y in model(torch.randn(1, 3, *size))).backward()
        grads.append({key: value.grad for key, value in model.named_parameters()})
    for key, value in grads[0].items():
        assert (value is None) == (model.get_layer_depth(key)[0] == 0), key
        if value is not None:
            torch.testing.assert_close(grads[1][key], value, rtol=1e-3, atol=1e-3 * value.abs().max().item(), msg=key)
    with torch.device('meta'):
        whole = timm.create_model(name, num_classes=10, **ARCHITECTURES[name])
    if hasattr(whole, 'group_matcher'):
        groups = group_parameters(whole, whole.group_matcher(), reverse=True)
        assert all(model.get_layer_depth(key)[0] == groups[key[len('model.') :]] for key in grads[0])


@pytest.mark.slow
@pytest.mark.parametrize('name', ARCHITECTURES)
def test_architectures_compile_without_graph_breaks(name):
    model = fill(TimmBackbone(name, **ARCHITECTURES[name]))
    assert_compiles(model, model.fixed_size or (64, 90))
