"""Converts weights of this package, MMPretrain or MMSegmentation to timm's names: mm2timm.py SRC DST.

Backbone and linear classifier are converted; necks and other heads have no place in timm's model. A
plain ViT with relative positions becomes timm's encoder of Segment Anything.
"""

from mmvitzoo.checkpoints.command import convert_file, rename_to

if __name__ == '__main__':
    convert_file(__doc__.splitlines()[0], rename_to('timm', relative='timm-sam'))
