"""Random state dicts: every weight is converted or dropped with a reason, or there is one clear error."""

import json
import re
from pathlib import Path
from random import Random

import pytest
import torch
from budget import fuzz, seeds
from evil import little_memory
from forms import FORMS, slim
from hypothesis import given
from torch import Tensor

from mmvitzoo.checkpoints import CheckpointError, convert
from mmvitzoo.checkpoints.conversion import _recognize
from mmvitzoo.checkpoints.layouts import LAYOUTS, Unsupported
from mmvitzoo.checkpoints.reading import with_metadata
from mmvitzoo.models import PlainViT
from mmvitzoo.models.backbones.vit_weights import backbone_metadata

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = [
    *('mpvit_tiny_official', 'mvitv2_tiny_official', 'mvitv2_tiny_d2', 'scalablevit_small_official'),
    *('vitae-s_vitae-repo', 'vitae_vitae-repo_small'),
    *('vitdet_d2_small', 'vitdet_d2_conv-propagation', 'vitdet_vitae-repo_small'),
    *('dinov2_swiglu_official', 'dinov2_hf_reg', 'dinov2_timm_reg', 'deit3_official_small', 'dinov3_timm_small'),
    *('dinov3_authors-keys_swiglu', 'dinov3_hf_small', 'vitmae_hf_small', 'clip_vision_small', 'sam_official_small'),
    *('openclip_visual_small', 'siglip_vision_small'),
]
# Plain ViTs with the options of DINOv2, DINOv3, CLIP, SigLIP, RoPE-ViT and Perception Encoder
OPTIONS = [
    dict(layer_scale_init_value=1.0, num_register_tokens=1),
    dict(layer_scale_init_value=1.0, num_register_tokens=1, pos_type='rope', ffn_type='swiglu'),
    dict(pre_norm=True),
    dict(with_cls_token=False),
    dict(layer_scale_init_value=1.0, pos_type='rope', rope_type='axial'),
    dict(layer_scale_init_value=1.0, pos_type='rope', rope_type='mixed'),
    dict(layer_scale_init_value=1.0, pos_type='rope', rope_type='sbb', with_cls_token=False, num_register_tokens=1),
    dict(pre_norm=True, final_norm=False, pos_type='learned+rope', rope_type='pe'),
]


def split(layout, weights):
    """Splits and reshapes weights that the names of a layout hold in another form."""
    targets = str(layout.table.values())
    for key, x in list(weights.items()):
        for name, parts in (('attn.qkv', ('attn.q', 'attn.k', 'attn.v')), ('mlp.fc1', ('mlp.gate', 'mlp.value'))):
            fc2 = weights.get(re.sub(r'fc1\.\w+$', 'fc2.weight', key), x)
            is_gated = x.dim() > 0 and len(x) == 2 * fc2.shape[-1]
            if f'.{name}.' in key and f'.{parts[0]}.' in targets and (len(parts) == 3 or is_gated):
                del weights[key]
                for part, y in zip(parts, x.chunk(len(parts))):
                    weights[key.replace(name, part)] = y
    if '.mlp.up.' in targets:
        weights = {re.sub(r'mlp\.(value|fc1)', 'mlp.up', key): x for key, x in weights.items()}
    if layout.source == 'google' and '.attn.q.' in targets:
        for key, x in weights.items():
            if key.endswith(('q.bias', 'k.bias', 'v.bias')):
                weights[key] = x.unflatten(0, (2, -1))
            elif x.dim() == 4:
                weights[key] = x.permute(2, 3, 1, 0)
            elif x.dim() == 2 and key.endswith('weight'):
                heads = {'q': (1, (2, -1)), 'k': (1, (2, -1)), 'v': (1, (2, -1)), 'proj': (0, (2, -1))}
                name = key.split('.')[-2]
                weights[key] = x.T.unflatten(*heads[name]) if '.attn.' in key else x.T
    return weights


def in_layout(layout, backbone, order=1):
    """Returns a backbone in the names of a layout, and a weight for each other row of its table.

    With an order of -1, the last of several names is taken.
    """
    weights = {f'backbone.{key}': x for key, x in backbone.items()}
    if layout.preprocess_export:
        try:
            weights = layout.preprocess_export(weights)
        except CheckpointError:  # the layout has no name for some weights
            return {}
    weights = split(layout, weights)
    theirs = {}
    for key, x in weights.items():
        for pattern, template in layout.inverse_rules()[::order]:
            match = pattern.fullmatch(key)
            if match:
                theirs[template.format(**{'chunk': 0, **match.groupdict()})] = x
                break
    for template, target in layout.table.items():
        if not isinstance(target, Unsupported) and not str(target).startswith(('backbone.', '{rest}')):
            key = re.sub(r'\{\w+\}', '0', template.replace('{leaf}', 'weight'))
            if key not in layout.absent:
                theirs.setdefault(key, torch.zeros(9))
    for key in layout.signature:
        if 'head' in key or 'attn_pool' in key:
            theirs.setdefault(key, torch.zeros(9))
    return theirs


def detached(state_dict):
    """Returns a copy with the metadata of the original."""
    weights = {key: value.detach() for key, value in state_dict.items()}
    return with_metadata(weights, backbone_metadata(state_dict), module='')


def published(name):
    """Returns the keys and shapes of an original implementation, with values that take no memory."""
    shapes = json.loads((ROOT / 'tests' / 'data' / 'golden' / f'{name}.json').read_text())['keys']
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


@pytest.fixture(scope='module')
def samples():
    """State dicts of every layout: of the original implementations, and of slim models in the names of its table."""
    samples = [published(name) for name in GOLDEN]
    prefixes = ('backbone.', 'backbone.bottom_up.backbone.')
    official = {key: x for key, x in samples[0].items() if not key.startswith('cls_head')}
    samples += [{prefix + key: x for key, x in official.items()} for prefix in prefixes]
    for form in FORMS:
        backbone = slim(form).state_dict()
        family = convert(backbone).family
        samples += [in_layout(layout, backbone) for layout in LAYOUTS if layout.family == family]
    arch = dict(embed_dims=8, num_layers=1, num_heads=2, mlp_ratio=1)
    for options in OPTIONS:
        backbone = PlainViT(arch, img_size=32, **options).state_dict()
        torch.nn.init.zeros_(backbone['patch_embed.proj.bias'])  # as a layout without a bias of patches writes it
        vit_layouts = [layout for layout in LAYOUTS if layout.family == 'plainvit']
        samples += [in_layout(layout, backbone, order) for layout in vit_layouts for order in (1, -1)]
        samples.append(backbone)  # with its metadata
    refused = [layout for layout in LAYOUTS if isinstance(layout.table.get('{rest}'), Unsupported)]
    known = {(x.family, x.source, x.signature) for x in LAYOUTS if x not in refused}
    found = []
    for sample in samples:
        if well_converted(sample):
            layout = _recognize(sample, None, None)
            found.append(sample)
            known.discard((layout.family, layout.source, layout.signature))
    assert not known, '\n'.join(map(str, known))
    return [lambda x=x: detached(x) for x in found]


# Original keys whose values a layout changes, and our keys that it makes from them.
CHANGED = re.compile(
    r'.*(pos_embed|position_embeddings|rel_pos_[hw]|[qv]_bias|cls_score\.\w+|bbox_pred\.\w+|class_embedding|'
    r'positional_embedding|position_embedding\.weight|(query|key|value|[qkv]_proj)\.\w+|qkv\.bias(_mask)?|'
    r'(gate_proj|up_proj|w[12]|fc1_[gx])\.\w+|/kernel|/(query|key|value)/bias)'
)
MADE = re.compile(
    r'backbone\.(cls_token|pos_embed|rope\.grid|patch_embed\.proj\.\w+|.*rel_pos_[hw]|.*attn\.(qkv\.\w+|proj\.weight)|'
    r'.*mlp\.fc[12]\.\w+)|head\.fc\.weight|bbox_head\.retina_(cls|reg)\.\w+'
)


def well_converted(state_dict, **wanted):
    """Converts and checks that every weight is converted or dropped; returns None after one clear error."""
    given = dict(state_dict)
    try:
        converted = convert(state_dict, **wanted)
    except CheckpointError as error:
        assert str(error).isprintable() and len(str(error)) <= 1000
        return None
    assert state_dict.keys() == given.keys() and all(state_dict[key] is x for key, x in given.items())
    assert all(isinstance(x, Tensor) for x in converted.state_dict.values())
    ours = {key: id(x) for key, x in converted.state_dict.items()}
    kept = {id(x): key for key, x in given.items() if key not in converted.dropped}
    made = {key for key, x in ours.items() if x not in kept}
    assert not [key for key in made if not MADE.fullmatch(key)]
    assert len(ours) - len(made) == len(kept.keys() & ours.values())  # no weight has two names
    lost = [key for x, key in kept.items() if x not in ours.values()]
    assert not [key for key in lost if not CHANGED.fullmatch(key)]
    return converted


def other_shape(x, i):
    return [
        lambda: x.transpose(0, -1) if x.dim() else x,
        lambda: x[None],
        lambda: x[..., None],
        lambda: x.flatten()[:0],
        lambda: x.flatten()[0],
        lambda: x.reshape(-1, 1),
        lambda: torch.cat([x, x]) if x.dim() else x,
        lambda: x[:1] if x.dim() else x,
        lambda: x[..., :1] if x.dim() else x,
        lambda: x.new_zeros(0, 10**12),
        lambda: x.new_zeros(1, 10**12, 0),
        lambda: x.new_zeros(1, 1, 1, 1, 1),
    ][i % 12]()


def mutate(weights, mutation, key, other, text, i):
    """Changes the weight ``key``, those alike, or all keys."""
    if mutation == 'remove':
        del weights[key]
    elif mutation == 'remove those alike':
        for x in [x for x in weights if x.rsplit('.', 2)[-2:] == key.rsplit('.', 2)[-2:]]:
            del weights[x]
    elif mutation == 'remove a module':
        for x in [x for x in weights if x.startswith(key.rsplit('.', i % 3 + 1)[0])]:
            del weights[x]
    elif mutation == 'shape':
        weights[key] = other_shape(weights[key], i)
    elif mutation == 'dtype':
        dtypes = (torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.bfloat16)
        weights[key] = weights[key].to(dtypes[i % 6])
    elif mutation == 'value':
        weights[key] = weights[key] + (1, float('nan'))[i % 2]
    elif mutation == 'swap':
        weights[key], weights[other] = weights[other], weights[key]
    elif mutation == 'number':
        weights[re.sub('[0-9]+', text, key, count=i % 2)] = weights.pop(key)
    elif mutation == 'name':
        weights[[f'{text}{key}', f'{key}{text}', text, key.replace('.', f'.{text}.')][i % 4]] = weights.pop(key)
    elif mutation == 'extra':
        weights[re.sub('[0-9]+', text, key, count=i % 2)] = weights[key] + 0
    elif mutation == 'prefix':
        for x in list(weights):
            weights[f'{text}.{x}' if i % 2 else x.split('.', 1)[-1]] = weights.pop(x)


MUTATIONS = ['remove', 'remove those alike', 'remove a module', 'shape', 'shape', 'dtype', 'value', 'swap', 'number']
MUTATIONS += ['name', 'extra', 'prefix']
TEXTS = ['0', '00', '7', '12', '10000000000', 'x', '-1', '', 'backbone', 'module', 'net', 'head', 'weight', 'cls_token']
TEXTS += ['\n', 'é', '\ud800', 'a' * 5000, '{rest}', 'shortcut_proj_mlp', 'dist_token', 'q_bias', '9' * 5000]
WANTED = [dict(family='mpvit'), dict(family='plainvit'), dict(source='official'), dict(source='mmvitzoo')]
WANTED += [dict(family='swin'), dict(family='mvitv2', source='keras')]


@fuzz(210)
@given(seed=seeds)
def test_convert_accounts_for_every_weight(samples, seed):
    random = Random(seed)
    weights = random.choice(samples)()
    wanted = random.choice(WANTED) if random.random() < 0.05 else {}
    mixed = random.random() < 0.1
    if mixed:
        weights.update(random.choice(samples)())
    mutations = random.choice([0, 1, 1, 1, 2, 2, 3])
    for _ in range(mutations):
        if weights:
            key, other = random.choices([*weights], k=2)
            mutate(weights, random.choice(MUTATIONS), key, other, random.choice(TEXTS), random.randrange(12))
    with little_memory():
        converted = well_converted(weights, **wanted)
    if not (mutations or mixed or wanted):
        assert converted is not None
    ours = [x for x in LAYOUTS if converted and x.family == converted.family and x.source == 'mmvitzoo'][:1]
    if ours and converted.source != 'mmvitzoo' and converted.state_dict.keys() >= set(ours[0].signature):
        again = convert(converted.state_dict)  # our names tell the same
        assert (again.family, again.source) == (converted.family, 'mmvitzoo')
        assert again.backbone_cfg == converted.backbone_cfg and again.state_dict.keys() == converted.state_dict.keys()
