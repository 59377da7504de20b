"""Layouts of the image encoders of CLIP and SigLIP; both are PlainViT."""

from functools import partial

from .layout import Dropped, Layout, backbone_under, part_under
from .vit import POOLING, TEXT_TOWER, TIMM_HEADS, TIMM_OPTIONS, postprocess_timm, preprocess_timm
from .vit_steps import add_batch_dims, add_patch_bias, join_qkv, metadata_of_timm, steps

_HUGGING_FACE = {
    'embeddings.class_embedding': 'cls_token',
    'embeddings.position_embedding.weight': 'pos_embed',
    'embeddings.patch_embedding.{leaf}': 'patch_embed.proj.{leaf}',
    'embeddings.position_ids': Dropped('numbers of the positions, which are no weights'),
    'pre_layrnorm.{leaf}': 'norm_pre.{leaf}',
    'encoder.layers.{b}.layer_norm{i}.{leaf}': 'blocks.{b}.norm{i}.{leaf}',
    'encoder.layers.{b}.self_attn.q_proj.{leaf}': 'blocks.{b}.attn.q.{leaf}',
    'encoder.layers.{b}.self_attn.k_proj.{leaf}': 'blocks.{b}.attn.k.{leaf}',
    'encoder.layers.{b}.self_attn.v_proj.{leaf}': 'blocks.{b}.attn.v.{leaf}',
    'encoder.layers.{b}.self_attn.out_proj.{leaf}': 'blocks.{b}.attn.proj.{leaf}',
    'encoder.layers.{b}.mlp.fc{i}.{leaf}': 'blocks.{b}.mlp.fc{i}.{leaf}',
    'post_layernorm.{leaf}': 'norm.{leaf}',
    'head.{rest}': POOLING,
}
OPENCLIP = {
    'class_embedding': 'cls_token',
    'positional_embedding': 'pos_embed',
    'conv1.weight': 'patch_embed.proj.weight',
    'ln_pre.{leaf}': 'norm_pre.{leaf}',
    'transformer.resblocks.{b}.ln_{i}.{leaf}': 'blocks.{b}.norm{i}.{leaf}',
    'transformer.resblocks.{b}.attn.in_proj_{leaf}': 'blocks.{b}.attn.qkv.{leaf}',
    'transformer.resblocks.{b}.attn.out_proj.{leaf}': 'blocks.{b}.attn.proj.{leaf}',
    'transformer.resblocks.{b}.mlp.c_fc.{leaf}': 'blocks.{b}.mlp.fc1.{leaf}',
    'transformer.resblocks.{b}.mlp.c_proj.{leaf}': 'blocks.{b}.mlp.fc2.{leaf}',
    'ln_post.{leaf}': 'norm.{leaf}',
    'proj': Dropped('projects the class token to the space of texts'),
}

_layout = partial(Layout, 'plainvit', 'PlainViT')

LAYOUTS = [
    *(
        _layout(
            'clip-huggingface',
            (prefix + 'embeddings.class_embedding', prefix + 'pre_layrnorm.weight'),
            part_under(prefix, _HUGGING_FACE, 'PlainViT', TEXT_TOWER),
            steps(add_batch_dims, join_qkv, add_patch_bias),
            metadata=dict(norm_eps=1e-5, act='quick_gelu'),
            assumed=('act',),
            square=True,
        )
        for prefix in ('vision_model.', '')
    ),
    *(
        _layout(
            'siglip-huggingface',
            (prefix + 'embeddings.position_embedding.weight', prefix + 'encoder.layers.0.self_attn.q_proj.weight'),
            part_under(prefix, _HUGGING_FACE, 'PlainViT', TEXT_TOWER),
            steps(add_batch_dims, join_qkv),
            metadata=dict(act='gelu_tanh'),
            square=True,
        )
        for prefix in ('vision_model.', '')
    ),
    # OpenAI's own weights have these names as well, and QuickGELU.
    _layout(
        'openclip',
        ('visual.class_embedding', 'visual.ln_pre.weight'),
        part_under('visual.', OPENCLIP, 'PlainViT', TEXT_TOWER),
        steps(add_batch_dims, add_patch_bias),
        metadata=dict(norm_eps=1e-5, act='gelu', interpolate_antialias=True),
        assumed=('act',),
        square=True,
        note='weights that OpenAI published need act=quick_gelu',
    ),
    # Towers that OpenCLIP takes from timm
    _layout(
        'openclip-timm',
        ('visual.trunk.patch_embed.proj.weight', 'visual.trunk.blocks.0.attn.qkv.weight'),
        part_under('visual.trunk.', {**TIMM_OPTIONS, 'attn_pool.{rest}': POOLING}, 'PlainViT', TEXT_TOWER),
        postprocess_timm,
        metadata=lambda state_dict: {'act': 'gelu', **metadata_of_timm(state_dict)},
        assumed=('act',),
    ),
    *(
        _layout(
            source,
            ('patch_embed.proj.weight', 'blocks.0.attn.qkv.weight', signature),
            {**backbone_under('', TIMM_OPTIONS), **TIMM_HEADS},
            postprocess_timm,
            preprocess_timm,
            lambda state_dict: {'act': 'gelu', **metadata_of_timm(state_dict)},
            assumed=('act',),
        )
        for source, signature in (('timm-clip', 'norm_pre.weight'), ('timm-siglip', 'attn_pool.latent'))
    ),
]
