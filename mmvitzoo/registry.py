"""Registry of the scope ``mmvitzoo``, so that configs can say ``type='mmvitzoo.MPViT'``.

Classes register in MMEngine's root ``MODELS``, where every toolbox finds ``type='MPViT'``. For an unknown scope,
MMEngine imports ``<scope>.registry`` and searches the child registry of that scope. The one defined here is empty and
falls back to the root.
"""

from mmengine.registry import MODELS as ROOT
from mmengine.registry import Registry

MODELS = Registry('model', parent=ROOT, scope='mmvitzoo', locations=['mmvitzoo.models'])
