"""Low-rank adaptation (LoRA, https://arxiv.org/abs/2106.09685) of the linear layers of a backbone.

A layer computes ``y = W x + b + alpha / rank * B A dropout(x)``. W and b are frozen and keep their names, so that
every checkpoint of the backbone still loads. A is ``lora_down.weight``, (rank, in_features), and B is
``lora_up.weight``, (out_features, rank). B starts at zero: the model starts as the pretrained one.
"""

import math
import re
from typing import Any, Dict, Optional, Sequence, Union

import torch.nn.functional as F
from mmcv.cnn import Linear
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..models.backbones.base import is_number

# Others compute something else, or are read instead of called, as in nn.MultiheadAttention.
LINEARS = (nn.Linear, Linear)
TARGET_KEYS = ('type', 'rank', 'alpha', 'dropout')


class LowRankMatrix(nn.Module):
    """Factor of a low-rank update. It is no ``nn.Linear``, so that initialization by type passes over it.

    Args:
        weight: (out_features, in_features).
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(x, self.weight)


class LoRALinear(nn.Linear):
    """``nn.Linear`` with a low-rank update.

    Args:
        linear: Layer to replace, whose parameters are used and frozen.
        rank: Rank of the update.
        alpha: Scale of the update, which is multiplied by ``alpha / rank``.
        dropout: Dropout rate of the input of the update.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device='meta')
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.scaling = alpha / rank
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_down = LowRankMatrix(linear.weight.detach().new_empty(rank, linear.in_features))
        self.lora_up = LowRankMatrix(linear.weight.detach().new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return super().forward(x) + self.scaling * self.lora_up(self.lora_down(self.lora_dropout(x)))

    def merged(self) -> nn.Linear:
        """Returns a plain layer with the weight ``W + alpha / rank * B A``."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device='meta')
        down, up = self.lora_down.weight.detach().float(), self.lora_up.weight.detach().float()
        weight = self.weight.detach().float() + self.scaling * (up @ down)
        linear.weight, linear.bias = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False), self.bias
        return linear.train(self.training)


def add_lora(
    model: nn.Module,
    targets: Sequence[Union[str, Dict[str, Any]]],
    rank: Optional[int] = None,
    alpha: float = 1.0,
    dropout: float = 0.0,
) -> nn.Module:
    """Freezes a model and puts low-rank updates into linear layers, in place.

    Args:
        model: Backbone of any package. Low-rank updates of layers that its ``frozen_stages`` freeze are frozen, too.
        targets: Names of layers: regular expressions of whole names, or their last characters, such as ``'qkv'``.
            A dict has the name as ``type`` and may have its own ``rank``, ``alpha`` and ``dropout``. The first that
            fits counts.
        rank: Rank of the updates.
        alpha: Scale of the updates, which are multiplied by ``alpha / rank``.
        dropout: Dropout rate of the input of the updates.

    Returns:
        ``model``.

    Raises:
        ValueError: A target is the name of no linear layer, or an argument is outside its range.
    """
    if not isinstance(targets, Sequence) or isinstance(targets, str) or not targets:
        raise ValueError(f'LoRA: targets is a sequence of at least one name, got {targets!r}')
    linears = {name: module for name, module in model.named_modules() if type(module) in LINEARS}
    chosen: Dict[str, Dict[str, Any]] = {}
    for target in [dict(type=x) if isinstance(x, str) else x for x in targets]:
        if not isinstance(target, dict) or not {'type'} <= set(target) <= set(TARGET_KEYS) or not target['type']:
            raise ValueError(f'LoRA: a target is a name or a dict of {", ".join(TARGET_KEYS)}, got {target!r}')
        names = [name for name in linears if name.endswith(target['type']) or _matches(target['type'], name)]
        if not names:
            examples = {re.sub(r'\b\d+\b', 'N', name): name for name in reversed(linears)}  # the first of each kind
            existing = ', '.join(reversed(examples.values())) or 'none'
            raise ValueError(
                f'LoRA: {target["type"]!r} fits no linear layer of {type(model).__name__}; it has {existing}'
            )
        options = dict(rank=target.get('rank', rank), alpha=target.get('alpha', alpha))
        options['dropout'] = target.get('dropout', dropout)
        _check(**options)
        for name in names:
            chosen.setdefault(name, options)
    model.requires_grad_(False)
    for name, options in chosen.items():
        parent, _, leaf = name.rpartition('.')
        module = model.get_submodule(parent)
        if leaf == 'qkv' and getattr(module, 'qkv_bias_separate', True) is False:
            module.qkv_bias_separate = True  # BEiT, EVA-02 and Swin V2 of timm otherwise read the weight of qkv
        setattr(module, leaf, LoRALinear(linears[name], **options))
    model.train(model.training)  # frozen_stages freeze the new parameters
    if hasattr(model, 'optional_keys'):  # pretrained checkpoints lack them
        model.optional_keys = (*model.optional_keys, r'.+\.lora_(down|up)\.weight')
    count = sum(x.numel() for x in model.parameters() if x.requires_grad)
    print_log(f'LoRA: {len(chosen)} layers of {type(model).__name__}, {count} parameters to train', logger='current')
    return model


def merge_lora(model: nn.Module) -> nn.Module:
    """Replaces layers with low-rank updates by plain linear layers, in place.

    Args:
        model: Backbone, or a model with one.

    Returns:
        ``model``.

    Raises:
        ValueError: The model has no low-rank updates.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError(f'LoRA: {type(model).__name__} has no low-rank updates to merge')
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition('.')
        setattr(model.get_submodule(parent), leaf, layer.merged())
    return model


@MODELS.register_module(name='LoRABackbone')
def build_lora_backbone(
    module: Dict[str, Any],
    targets: Sequence[Union[str, Dict[str, Any]]],
    rank: Optional[int] = None,
    alpha: float = 1.0,
    dropout: float = 0.0,
) -> nn.Module:
    """Builds a backbone with low-rank updates: ``type='LoRABackbone'`` in a config.

    The result is the backbone itself, with its attributes, its names of weights and its ``init_cfg``.

    Args:
        module: Config of the backbone.
        targets: Names of linear layers, see :func:`add_lora`.
        rank: Rank of the updates.
        alpha: Scale of the updates, which are multiplied by ``alpha / rank``.
        dropout: Dropout rate of the input of the updates.
    """
    return add_lora(MODELS.build(module), targets, rank, alpha, dropout)


def _matches(pattern: str, name: str) -> bool:
    try:
        return bool(re.fullmatch(pattern, name))
    except re.error as error:
        raise ValueError(f'LoRA: {pattern!r} is no regular expression: {error}') from None


def _check(rank: Any, alpha: Any, dropout: Any) -> None:
    if not is_number(rank) or rank < 1:
        raise ValueError(f'LoRA: rank is a number of at least 1, got {rank!r}')
    if not is_number(alpha, (int, float)) or alpha <= 0:
        raise ValueError(f'LoRA: alpha is a number above 0, got {alpha!r}')
    if not is_number(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f'LoRA: dropout is at least 0 and less than 1, got {dropout!r}')
