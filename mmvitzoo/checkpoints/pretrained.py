"""Loads checkpoints for ``init_cfg=dict(type='Pretrained')`` on a backbone of this package."""

import re
from collections import Counter
from pathlib import Path
from typing import Optional

from mmengine.logging import print_log
from torch import nn

from ..models.backbones.vit_weights import backbone_metadata
from .conversion import convert_for
from .reading import CheckpointError, download_once_per_node, is_url, load, with_metadata


def load_pretrained(
    backbone: nn.Module, checkpoint: str, prefix: Optional[str] = None, key: Optional[str] = None
) -> None:
    """Loads a checkpoint of any known layout into a backbone and logs its layout and variant.

    In a distributed run every process has to call it: the first process of each node downloads an address, and the
    others wait.

    Args:
        backbone: A backbone of this package, or of a subclass.
        checkpoint: A file or http(s) address, see :func:`mmvitzoo.checkpoints.load`.
        prefix: Read only the keys below it, such as ``'backbone.'``, and remove it.
        key: Entry of the file that holds the weights, such as ``'model_ema'``.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file cannot be read, is of another family or variant, or lacks weights of the backbone.
    """
    if is_url(checkpoint):
        download_once_per_node(checkpoint)
    elif not Path(checkpoint).is_file():
        raise FileNotFoundError(missing_pretrained(checkpoint))
    state_dict = load(checkpoint, key)
    if prefix:
        prefix = prefix.rstrip('.') + '.'
        metadata = backbone_metadata(state_dict)
        state_dict = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        state_dict = with_metadata(state_dict, metadata, module='')
        if not state_dict:
            raise CheckpointError(f'{checkpoint}: no key starts with {prefix!r}')
    name = type(backbone).__name__
    try:
        result = convert_for(backbone, state_dict)
        backbone.check_compatible(result)
    except ValueError as error:
        raise CheckpointError(f'{checkpoint}: {error}') from None
    backbone.log_differences(result)
    try:
        missing, unexpected = backbone.load_state_dict(result.backbone, strict=False)
    except ValueError as error:
        raise CheckpointError(f'{checkpoint}: {error}') from None
    except RuntimeError as error:
        _, first, *others = str(error).splitlines()
        more = f' ({len(others)} more differ)' if others else ''
        raise CheckpointError(
            f'{checkpoint}: holds {name} of arch {result.description}, which the model is not: {first.strip()}{more}'
        ) from None
    absent = [x for x in backbone.optional_keys if not any(re.fullmatch(x, key) for key in result.backbone)]
    new = [key for key in missing if any(re.fullmatch(x, key) for x in absent)]
    missing = [key for key in missing if key not in new]
    if missing:
        raise CheckpointError(
            f'{checkpoint}: lacks {len(missing)} weights of {name}: {", ".join(missing[:5])}; '
            f'it holds arch {result.description}'
        )
    print_log(
        f'{name}: loaded {len(result.backbone) - len(unexpected)} tensors of arch {result.description} '
        f'from {checkpoint} ({result.source} layout)',
        logger='current',
    )
    if result.note:
        print_log(f'{name}: {result.note}', logger='current')
    if new:
        print_log(f'{name}: {len(new)} weights are new, such as {new[0]}', logger='current')
    others = [key for key in result.state_dict if not key.startswith('backbone.')]
    reasons = [*result.dropped.values(), *['not in this backbone'] * len([*unexpected, *others])]
    for reason, count in Counter(reasons).items():
        print_log(f'{name}: left out {count} tensors of {checkpoint}: {reason}', logger='current')


def missing_pretrained(checkpoint: str) -> str:
    """Returns the error message for pretrained weights that do not exist."""
    return (
        f'{checkpoint}: no such checkpoint file. The README beside the config says where to get pretrained weights; '
        'init_cfg=None of the backbone trains from random ones'
    )
