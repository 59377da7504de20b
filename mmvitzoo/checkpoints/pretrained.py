"""What ``init_cfg=dict(type='Pretrained')`` does on a backbone of this package."""

import re
from collections import Counter
from typing import Optional

from mmengine.logging import print_log
from torch import nn

from .conversion import convert
from .reading import CheckpointError, load


def load_pretrained(backbone: nn.Module, checkpoint: str, prefix: Optional[str] = None) -> None:
    """Loads a checkpoint of any known layout into a backbone and logs what it was.

    Args:
        backbone: A backbone of this package.
        checkpoint: A file or http(s) address, see :func:`mmvitzoo.checkpoints.load`.
        prefix: Read only the keys below it, such as ``'backbone.'``, and take it off.

    Raises:
        CheckpointError: The file cannot be read, is of another family or variant, or lacks
            weights of the backbone.
    """
    state_dict = load(checkpoint)
    if prefix:
        prefix = prefix.rstrip('.') + '.'
        state_dict = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if not state_dict:
            raise CheckpointError(f'{checkpoint}: no key starts with {prefix!r}')
    name = type(backbone).__name__
    try:
        converted = convert(state_dict, family=name.lower())
    except CheckpointError as error:
        raise CheckpointError(f'{checkpoint}: {error}') from None
    try:
        backbone.check_converted(converted)
    except ValueError as error:
        raise CheckpointError(f'{checkpoint}: {error}') from None
    try:
        missing, unexpected = backbone.load_state_dict(converted.backbone, strict=False)
    except RuntimeError as error:
        details = ' '.join(str(error).split('\n')[:4])
        raise CheckpointError(
            f'{checkpoint}: holds {name} of arch {converted.arch}, which the model is not: {details}'
        ) from None
    absent = [x for x in backbone.may_lack if not any(re.fullmatch(x, key) for key in converted.backbone)]
    new = [key for key in missing if any(re.fullmatch(x, key) for x in absent)]
    missing = [key for key in missing if key not in new]
    if missing:
        raise CheckpointError(f'{checkpoint}: lacks {len(missing)} weights of {name}: {", ".join(missing[:5])}')
    print_log(
        f'{name}: loaded {len(converted.backbone) - len(unexpected)} tensors of arch {converted.arch} '
        f'from {checkpoint} ({converted.source} layout)',
        logger='current',
    )
    if new:
        print_log(f'{name}: {len(new)} weights are new, such as {new[0]}', logger='current')
    others = [key for key in converted.state_dict if not key.startswith('backbone.')]
    reasons = [*converted.dropped.values(), *['not in this backbone'] * len([*unexpected, *others])]
    for reason, count in Counter(reasons).items():
        print_log(f'{name}: left out {count} tensors of {checkpoint}: {reason}', logger='current')
