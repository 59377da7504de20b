"""Transformer blocks, and what lets the backward pass compute a block again."""

from typing import Union

from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .linear import Mlp


class Recomputed(nn.Module):
    """A block that implements ``transform`` instead of ``forward``.

    Args:
        with_cp: Compute the block again in the backward pass, instead of keeping all that it has
            computed (https://arxiv.org/abs/1604.06174).
    """

    def __init__(self, with_cp: bool):
        super().__init__()
        self.with_cp = with_cp

    def forward(self, *args: Union[Tensor, nn.Module]) -> Tensor:
        """Takes and returns what :meth:`transform` does; its first argument is the map or the tokens."""
        if self.with_cp and args[0].requires_grad:
            return checkpoint(self.transform, *args, use_reentrant=False)
        return self.transform(*args)

    def transform(self, *args: Union[Tensor, nn.Module]) -> Tensor:
        """The block itself."""
        raise NotImplementedError


class Block(Recomputed):
    """Pre-norm transformer block, as in ViT (https://arxiv.org/abs/2010.11929).

    Args:
        dim: Channels.
        attn: The attention.
        mlp_ratio: Width of the MLP over ``dim``.
        drop_path: Rate of stochastic depth (https://arxiv.org/abs/1603.09382).
        with_cp: Recompute the block in the backward pass.
    """

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float = 0.0, with_cp: bool = False):
        super().__init__(with_cp)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def transform(self, x: Tensor) -> Tensor:
        """(B, ..., C) -> (B, ..., C), whatever the attention takes."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
