"""Patches to tokens, with learned absolute positions."""

import math
from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .compiling import known


class PatchEmbedding(nn.Module):
    """Non-overlapping patches, learned positions and, if wanted, a class token (https://arxiv.org/abs/2010.11929).

    Images that the patch size does not divide are padded with zeros at the bottom and on the
    right; positions are resized to the map by bicubic interpolation. Loading a checkpoint resizes
    positions that were learned for another square grid, and leaves out a class token that is not
    wanted, with its position.

    Args:
        dim: Channels.
        patch_size: Side of a patch, in pixels.
        grid: Rows and columns for which positions are learned.
        with_cls_token: Put a class token before the others.
    """

    def __init__(self, dim: int, patch_size: int, grid: Tuple[int, int], with_cls_token: bool):
        super().__init__()
        self.grid = grid
        self.projection = nn.Conv2d(3, dim, patch_size, patch_size)
        self.num_extra = int(with_cls_token)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_extra + math.prod(grid), dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if with_cls_token else None
        trunc_normal_(self.pos_embed, std=0.02)
        if with_cls_token:
            trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H', W', C), the image alone without its class token.

        H' and W' are H and W divided by the patch size, rounded up.
        """
        patch = self.projection.stride[0]
        height, width = x.shape[2:]
        if not (known(height % patch == 0) and known(width % patch == 0)):
            x = F.pad(x, (0, -width % patch, 0, -height % patch))
        # Sums take the order of their first term in memory: here it is settled for every block.
        x = self.projection(x).permute(0, 2, 3, 1).contiguous()
        return x + resize_positions(self.pos_embed[:, self.num_extra :], self.grid, x.shape[1:3])

    def with_token(self, x: Tensor) -> Tensor:
        """(B, H', W', C) -> (B, 1 + H' * W', C), the class token first."""
        token = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if self.cls_token is None and state_dict.pop(f'{prefix}cls_token', None) is not None:
            print_log('PatchEmbedding: the checkpoint has a class token, which this model has not', logger='current')
        given: Optional[Tensor] = state_dict.get(f'{prefix}pos_embed')
        if given is not None and given.dim() == 3 and given.shape[1] != self.pos_embed.shape[1]:
            side = math.isqrt(given.shape[1])
            extra = given.shape[1] - side**2  # a class token's position
            if extra <= 1 and (extra or not self.num_extra):
                positions = resize_positions(given[:, extra:], (side, side), self.grid).flatten(1, 2)
                state_dict[f'{prefix}pos_embed'] = torch.cat([given[:, : self.num_extra], positions], 1)
                if (side, side) != tuple(self.grid):
                    print_log(
                        f'PatchEmbedding: resized positions from {side} x {side} to {self.grid}', logger='current'
                    )
        super()._load_from_state_dict(state_dict, prefix, *args)


def resize_positions(pos_embed: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """(1, rows * columns of ``grid``, C) -> (1, H, W, C) for ``size`` (H, W), by bicubic interpolation."""
    x = pos_embed.unflatten(1, tuple(grid))
    if known(grid[0] == size[0]) and known(grid[1] == size[1]):
        return x
    x = F.interpolate(x.permute(0, 3, 1, 2).float(), size=tuple(size), mode='bicubic', align_corners=False)
    return x.permute(0, 2, 3, 1).to(pos_embed.dtype)
