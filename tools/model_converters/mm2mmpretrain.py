"""Converts weights of this package, timm or the authors to MMPretrain's names: mm2mmpretrain.py SRC DST.

For its VisionTransformer and MViT. Backbone and linear classifier are converted; necks and other
heads have no place in MMPretrain's model.
"""

from mmvitzoo.checkpoints.command import convert_file, rename_to

if __name__ == '__main__':
    convert_file(__doc__.splitlines()[0], rename_to('mmpretrain'))
