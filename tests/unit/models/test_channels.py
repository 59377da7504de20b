"""Images of other than three channels: checkpoints, their errors and logs, and timm's models."""

import pytest
import timm
import torch
from forms import slim
from mmengine.runner.checkpoint import load_checkpoint

from mmvitzoo.checkpoints import CheckpointError, convert, load_pretrained, match_names
from mmvitzoo.models import PlainViT
from mmvitzoo.models.backbones import base


@pytest.fixture
def lines(monkeypatch):
    """Lines that backbones log."""
    lines = []
    monkeypatch.setattr(base, 'print_log', lambda line, logger: lines.append(line))
    return lines


@pytest.mark.parametrize('in_channels', [1, 2, 4, 13])
@torch.no_grad()
def test_plain_vit_equals_timm(in_channels, tmp_path):
    """timm adapts the same file of 3 channels by its own loader."""
    slim_vit = dict(img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=10)
    torch.save(timm.create_model('vit_tiny_patch16_224', **slim_vit).state_dict(), tmp_path / 'rgb.pth')
    overlay = dict(file=str(tmp_path / 'rgb.pth'), num_classes=10)
    theirs = timm.create_model(
        'vit_tiny_patch16_224', pretrained=True, pretrained_cfg_overlay=overlay, in_chans=in_channels, **slim_vit
    ).eval()
    arch = dict(embed_dims=48, num_layers=2, num_heads=3, mlp_ratio=4)
    ours = PlainViT(arch, img_size=32, out_type='raw', in_channels=in_channels).eval()
    load_pretrained(ours, str(tmp_path / 'rgb.pth'))
    assert torch.equal(ours.patch_embed.proj.weight, theirs.patch_embed.proj.weight)
    x = torch.randn(2, in_channels, 32, 32)
    torch.testing.assert_close(ours(x)[0], theirs.forward_features(x), rtol=1e-5, atol=1e-5)


def load_by_name(model, weights, path):
    model.load_state_dict(weights)


def load_as_pretrained(model, weights, path):
    torch.save(weights, path)
    load_pretrained(model, str(path))


def load_in_mmengine(model, weights, path):
    torch.save(weights, path)
    load_checkpoint(model, str(path))


every_way = pytest.mark.parametrize('load', [load_by_name, load_as_pretrained, load_in_mmengine])


@every_way
def test_every_way_of_loading_adapts_and_logs_once(load, lines, tmp_path):
    """ViTAE-S has five convolutions of the image. Half precision stays, after a sum in float32."""
    weights = slim('vitae_s').half().state_dict()
    model = slim('vitae_s', in_channels=1).half()
    load(model, weights, tmp_path / 'rgb.pth')
    assert lines == ['ViTAE: adapted the first convolution from 3 to 1 channels']
    for key in ('patch_embed.0.prm.3.weight', 'patch_embed.0.pcm.0.weight'):
        assert torch.equal(model.state_dict()[key], weights[key].float().sum(1, keepdim=True).half())


@every_way
@pytest.mark.parametrize('channels', [(4, 3), (4, 1), (1, 3)])
def test_other_channels_are_refused(load, channels, tmp_path):
    weights = slim('mpvit', in_channels=channels[0]).state_dict()
    message = f'MPViT: the checkpoint is for images of {channels[0]} channels, the model has in_channels={channels[1]}'
    with pytest.raises(ValueError if load is load_by_name else CheckpointError, match=message):
        load(slim('mpvit', in_channels=channels[1]), weights, tmp_path / 'a.pth')


def test_checkpoint_of_the_same_channels_is_unchanged(lines, tmp_path):
    source = slim('mvitv2', in_channels=4)
    result = convert(source.state_dict())
    model = slim('mvitv2', in_channels=4)
    load_as_pretrained(model, source.state_dict(), tmp_path / 'a.pth')
    assert torch.equal(model.patch_embed.proj.weight, source.patch_embed.proj.weight) and not lines
    assert result.backbone['patch_embed.proj.weight'].shape[1] == result.backbone_cfg['in_channels'] == 4


def test_adapted_weights_count_as_found():
    """Half of the weights have to fit: here the first convolution makes up that half."""
    model, weights = slim('mpvit', out_indices=(0,), in_channels=4), slim('mpvit', out_indices=(0,)).state_dict()
    keys = [key for key in weights if not key.endswith('num_batches_tracked')]
    half = {key: weights[key] for key in keys[: (len(keys) + 1) // 2]}
    assert 'stem.0.conv.weight' in half and match_names(model, half).keys() == half.keys()


@pytest.mark.parametrize('in_channels', [0, 2.0, None])
def test_number_of_channels_is_positive(in_channels):
    with pytest.raises(ValueError, match='in_channels is an integer of at least 1, got'):
        slim('mpvit', in_channels=in_channels)
