"""PlainViT has timm's parameter names, so that state dicts of timm, DeiT and MAE load without conversion."""

import pytest
import timm
import torch

from mmvitzoo.models import PlainViT


@pytest.mark.parametrize(
    'arch, name',
    [
        ('tiny', 'vit_tiny_patch16_224'),
        ('tiny', 'deit_tiny_patch16_224'),
        ('base', 'vit_base_patch16_224.mae'),
        ('large', 'vit_large_patch16_224.mae'),
    ],
)
def test_timm_state_dict_loads(arch, name):
    with torch.device('meta'):
        model = PlainViT(arch, out_type='cls_token')
        state_dict = timm.create_model(name).state_dict()
    missing, unexpected = model.load_state_dict(state_dict, strict=False, assign=True)
    assert not missing and all(key.startswith('head.') for key in unexpected)


def test_mae_checkpoint_loads():
    """MAE's own checkpoints have a decoder."""
    with torch.device('meta'):
        model = PlainViT('base')
        state_dict = timm.create_model('vit_base_patch16_224', num_classes=0).state_dict()
        decoder = timm.create_model('vit_tiny_patch16_224', num_classes=0).state_dict()
    state_dict['mask_token'] = torch.zeros(1, 1, 512, device='meta')
    state_dict.update({f'decoder_{key}': value for key, value in decoder.items()})
    missing, unexpected = model.load_state_dict(state_dict, strict=False, assign=True)
    assert not missing and all(key.startswith(('decoder_', 'mask_token')) for key in unexpected)


def test_outputs_equal_timm():
    torch.manual_seed(0)
    expected = timm.create_model('vit_tiny_patch16_224', num_classes=0).eval()
    model = PlainViT('tiny', out_type='cls_token').eval()
    model.load_state_dict(expected.state_dict())
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[-1], expected(x), atol=1e-5, rtol=1e-5)
