"""Converts a published checkpoint to this package's key names: official2mm.py SRC DST.

Family, layout and variant are recognised by the keys and shapes.
"""

from mmvitzoo.checkpoints import convert
from mmvitzoo.checkpoints.command import convert_file


def rename(state_dict):
    converted = convert(state_dict)
    return converted.state_dict, converted


if __name__ == '__main__':
    convert_file(__doc__.splitlines()[0], rename)
