"""Converts a timm, DeiT or MAE checkpoint to this package's key names: timm2mm.py SRC DST."""

from mmvitzoo.checkpoints import CheckpointError, convert
from mmvitzoo.checkpoints.command import convert_file


def rename(state_dict):
    converted = convert(state_dict)
    if not converted.source.startswith('timm'):
        raise CheckpointError(
            f'is of the {converted.family}/{converted.source} layout, not of timm; official2mm.py converts it'
        )
    return converted.state_dict, converted


if __name__ == '__main__':
    convert_file(__doc__, rename)
