"""timm's models with the options of PlainViT beside it with their weights, and back."""

import pytest
import timm
import torch
from mmengine.registry import MODELS

from mmvitzoo.checkpoints import CheckpointError, convert, export

SLIM = dict(embed_dim=128, num_heads=2)
PEERS = {
    'vit_small_patch14_dinov2': {},
    'vit_giant_patch14_dinov2': SLIM,
    'vit_small_patch14_reg4_dinov2': {},
    'vit_base_patch14_reg1_tipsv2': SLIM,
    'vit_small_patch16_dinov3': {},
    'vit_small_patch16_dinov3_qkvb': {},
    'vit_small_plus_patch16_dinov3_qkvb': {},
    'vit_7b_patch16_dinov3': dict(embed_dim=256, num_heads=2),
    'deit3_small_patch16_224': {},
    'vit_base_patch16_clip_224': SLIM,
    'vit_base_patch16_clip_quickgelu_224': SLIM,
    'vit_base_patch16_siglip_256': SLIM,
    'vit_large_patch16_siglip_512': SLIM,
    'vit_so400m_patch14_siglip_224': {},
    'vit_betwixt_patch16_reg4_gap_256': SLIM,
    'vit_pe_core_tiny_patch16_384': dict(SLIM, ref_feat_shape=5),
    'vit_pe_lang_large_patch14_448': dict(SLIM, ref_feat_shape=5),
    'vit_pe_spatial_tiny_patch16_512': dict(SLIM, ref_feat_shape=5),
    'vit_pe_spatial_gigantic_patch14_448': dict(SLIM, ref_feat_shape=5, mlp_ratio=2),
    'vit_betwixt_patch16_rope_reg4_gap_256': SLIM,
    'vit_mediumd_patch16_rope_reg1_gap_256': SLIM,
    'vit_small_patch16_rope_224': SLIM,
    'vit_small_patch16_rope_mixed_224': SLIM,
    'vit_small_patch16_rope_mixed_ape_224': SLIM,
}
ACTS = {'vit_base_patch16_clip_quickgelu_224': 'quick_gelu', 'vit_large_patch16_siglip_512': 'gelu_tanh'}


def build_peer(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, img_size=80 if 'patch16' in name else 70, **kwargs).eval()
    for key, value in model.named_parameters():
        noise = torch.randn_like(value)
        if key.endswith(('gamma', 'gamma_1', 'gamma_2')):
            value.data = 0.5 + 0.1 * noise
        elif value.dim() == 1:
            value.data = 1 + 0.1 * noise if key.endswith('weight') else 0.1 * noise
        else:
            value.data = 0.2 * noise if value.shape[0] == 1 else noise / value[0].numel() ** 0.5
    return model


@pytest.mark.parametrize('name', PEERS)
def test_same_maps_and_tokens(name):
    """At the size of the weights, at another ratio, and at a size that patches do not divide."""
    peer = build_peer(name, dynamic_img_size=True, dynamic_img_pad=True, **PEERS[name])
    result = convert(peer.state_dict(), act=ACTS.get(name))
    arch = dict(result.arch, num_heads=peer.blocks[0].attn.num_heads)
    model = MODELS.build(dict(result.backbone_cfg, arch=arch)).eval()
    model.load_state_dict(result.backbone)
    patch = peer.patch_embed.patch_size[0]
    for height, width in ((5 * patch, 5 * patch), (4 * patch, 7 * patch), (4 * patch + 3, 6 * patch + 5)):
        image = torch.randn(1, 3, height, width)
        has_prefix = peer.num_prefix_tokens > 0
        kwargs = dict(indices=2, return_prefix_tokens=has_prefix, norm=True, intermediates_only=True)
        with torch.no_grad():
            for ours, theirs in zip(*(x.forward_intermediates(image, **kwargs) for x in (model, peer))):
                for a, b in zip(ours, theirs) if has_prefix else [(ours, theirs)]:
                    assert a.shape == b.shape and (a - b).norm() < 3e-6 * b.norm()


@pytest.mark.parametrize('name', [name for name in PEERS if 'siglip' not in name and 'quickgelu' not in name])
def test_back_to_timm(name):
    theirs = build_peer(name, **{**SLIM, **PEERS[name]}, num_classes=0).state_dict()
    converted = convert(theirs)
    target = converted.source if 'rope_type' in converted.backbone_cfg else 'timm'
    back = export(converted.state_dict, 'plainvit', target)
    assert back.keys() == theirs.keys() - converted.dropped.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in back.items())


@pytest.mark.parametrize(
    'case, name',
    [
        ('dinov2_small_official', 'vit_small_patch14_dinov2'),
        ('dinov2_reg_official', 'vit_small_patch14_reg4_dinov2'),
        ('dinov2_hf_reg', 'vit_small_patch14_reg4_dinov2'),
        ('deit3_official_small', 'deit3_small_patch16_224'),
        ('dinov3_hf_small', 'vit_small_patch16_dinov3_qkvb'),
        ('dinov3_hf_swiglu', 'vit_small_plus_patch16_dinov3_qkvb'),
    ],
)
def test_authors_weights_in_timm(load_golden, case, name):
    golden = load_golden(case)
    weights = convert(golden.state_dict).state_dict
    weights = {key: value for key, value in weights.items() if key.startswith('backbone.')}
    target = 'timm-dinov3' if 'dinov3' in case else 'timm'
    size = golden.input.shape[-1]
    ratio = dict(mlp_ratio=1.5) if 'swiglu' in case else {}
    model = timm.create_model(name, depth=4, img_size=size, num_classes=0, **SLIM, **ratio).eval()
    model.load_state_dict(export(weights, 'plainvit', target))
    with torch.no_grad():
        tokens = model.forward_features(golden.input)
    assert golden.error('trained/tokens', tokens) < 3e-6


def test_bias_of_keys_has_no_place_in_timm():
    weights = convert(build_peer('vit_small_patch16_dinov3_qkvb', num_classes=0).state_dict()).state_dict
    weights['backbone.blocks.1.attn.qkv.bias'] = torch.ones(3 * 384)
    with pytest.raises(CheckpointError, match='no bias of keys .* not zero in backbone.blocks.1.attn.qkv.bias'):
        export(weights, 'plainvit', 'timm-dinov3')
