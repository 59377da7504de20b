"""Makes ``type='mmvitzoo.MPViT'`` resolve.

Classes register in MMEngine's root ``MODELS``, so that plain ``type='MPViT'`` is found from every
toolbox. MMEngine imports ``<scope>.registry`` when it meets an unknown scope and asks the child of
that scope, which is this empty one: it hands the question on to the root.
"""

from mmengine.registry import MODELS as ROOT
from mmengine.registry import Registry

MODELS = Registry('model', parent=ROOT, scope='mmvitzoo', locations=['mmvitzoo.models'])
