"""Converts a plain ViT of this package, MMPretrain or MMSegmentation to timm's names: mm2timm.py SRC DST.

Backbone and linear classifier are converted; necks and other heads have no place in timm's model.
"""

from mmvitzoo.checkpoints import convert, export
from mmvitzoo.checkpoints.command import convert_file


def rename(state_dict):
    converted = convert(state_dict, family='plainvit')
    kept = {key: value for key, value in converted.state_dict.items() if key.startswith(('backbone.', 'head.fc.'))}
    for key in converted.state_dict.keys() - kept.keys():
        converted.dropped[key] = "has no place in timm's model"
    return export(kept, 'plainvit', 'timm'), converted


if __name__ == '__main__':
    convert_file(__doc__.splitlines()[0], rename)
