"""Cost of models, and pictures of their backbones.

:mod:`mmvitzoo.analysis.cost`, which requires PyTorch >= 2.3, is not imported here.
"""

from .attention import AttentionMap, attention_maps, draw_attention
from .class_activation import ClassActivation, class_activations, draw_class_activations
from .features import FeatureMap, draw_features, feature_maps
from .grid import Grid
from .images import normalize
from .receptive_field import ReceptiveField, draw_receptive_fields, receptive_fields

__all__ = [
    'AttentionMap',
    'ClassActivation',
    'FeatureMap',
    'Grid',
    'ReceptiveField',
    'attention_maps',
    'class_activations',
    'draw_attention',
    'draw_class_activations',
    'draw_features',
    'draw_receptive_fields',
    'feature_maps',
    'normalize',
    'receptive_fields',
]
