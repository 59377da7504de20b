"""Converts a timm or DeiT ViT for MMSegmentation's own VisionTransformer: vit2mmseg.py SRC DST.

The classifier is left out. The last norm is written as `ln1`, which a model without `final_norm`
does not expect and MMSegmentation reports as such; so is the bias of the patch embedding, which
MMSegmentation 1 leaves out unless the model has `patch_bias=True`.
"""

from mmvitzoo.checkpoints import convert, export
from mmvitzoo.checkpoints.command import convert_file


def rename(state_dict):
    converted = convert(state_dict, family='plainvit')
    kept = {key: value for key, value in converted.state_dict.items() if key.startswith('backbone.')}
    for key in converted.state_dict.keys() - kept.keys():
        converted.dropped[key] = 'belongs to the classifier, or to another head'
    return export(kept, 'plainvit', 'mmseg'), converted


if __name__ == '__main__':
    convert_file(__doc__.splitlines()[0], rename)
