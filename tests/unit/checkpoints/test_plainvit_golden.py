"""Checkpoints of DINOv2, DINOv3, DeiT III, CLIP, SigLIP, Hugging Face's ViT and Segment Anything against originals."""

import pytest
import torch
from mmengine.registry import MODELS

from mmvitzoo.checkpoints import convert

SOURCES = {
    'dinov2_small_official': 'dinov2',
    'dinov2_reg_official': 'dinov2',
    'dinov2_swiglu_official': 'dinov2',
    'dinov2_hf_small': 'dinov2-huggingface',
    'dinov2_hf_reg': 'dinov2-huggingface',
    'dinov2_hf_swiglu': 'dinov2-huggingface',
    'dinov2_timm_reg': 'timm',
    'deit3_official_small': 'deit3',
    'dinov3_authors-keys_small': 'dinov3',
    'dinov3_authors-keys_swiglu': 'dinov3',
    'dinov3_hf_small': 'dinov3-huggingface',
    'dinov3_hf_swiglu': 'dinov3-huggingface',
    'dinov3_timm_small': 'timm-dinov3',
    'dinov3_timm_swiglu': 'timm-dinov3',
    'vit_hf_small': 'huggingface',
    'vitmae_hf_small': 'huggingface',
    'clip_vision_small': 'clip-huggingface',
    'openclip_visual_small': 'openclip',
    'siglip_vision_small': 'siglip-huggingface',
    'sam_official_small': 'sam',
}


@pytest.mark.parametrize('name', SOURCES)
def test_maps_and_tokens(load_golden, name):
    """Maps, class tokens and last tokens of every input; the wrong rule of any detail is above the limit."""
    case = load_golden(name)
    result = convert(case.state_dict)
    assert result.source == SOURCES[name]
    model = MODELS.build(result.backbone_cfg).eval()
    model.load_state_dict(result.backbone)
    has_norm = result.backbone_cfg['final_norm']
    outputs = {}
    with torch.no_grad():
        for input_name, image in case.inputs.items():
            last, maps = model.forward_intermediates(image, (1, 3), return_prefix_tokens=True, norm=has_norm)
            for i, y in zip((1, 3), maps):
                y, prefix = y if isinstance(y, tuple) else (y, None)
                outputs[f'{input_name}/block{i}'] = y
                if prefix is not None:
                    outputs[f'{input_name}/cls{i}'] = prefix[:, 0]
            outputs[f'{input_name}/tokens'] = last if last.dim() == 3 else last.flatten(2).transpose(1, 2)
        assert torch.equal(model(image)[-1], outputs[f'{input_name}/block3'])
    expected = [key for key in case.case['outputs'] if key.split('/')[1][:3] in ('blo', 'cls', 'tok')]
    assert len(expected) >= 2
    errors = {key: case.error(key, outputs[key]) for key in expected}
    assert max(errors.values()) < 3e-6, errors
