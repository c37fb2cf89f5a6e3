"""Masked autoencoder: He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022."""

from __future__ import annotations

import torch
from timm.models import VisionTransformer, checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from attention_transfer import draws


class MaskedAutoencoder(nn.Module):
    """The encoder sees the visible patches only; a light decoder predicts the pixels of the others.

    Args:
        encoder: a plain timm ViT with class token; after pre-training it is the teacher as it stands.
        decoder_width, decoder_depth, decoder_heads: of the decoder.
        mask_ratio: share of patches that are hidden.
    """

    views = 1
    labelled = False

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        decoder_width: int,
        decoder_depth: int,
        decoder_heads: int,
        mask_ratio: float,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.patches = encoder.patch_embed.num_patches
        self.patch_size: int = encoder.patch_embed.patch_size[0]
        # At least one patch is visible and one is hidden, however extreme the ratio.
        self.visible = max(1, min(self.patches - 1, round(self.patches * (1 - mask_ratio))))
        channels = encoder.patch_embed.proj.in_channels
        self.norm = nn.LayerNorm(encoder.embed_dim)
        self.to_decoder = nn.Linear(encoder.embed_dim, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_positions = nn.Parameter(torch.randn(1, self.patches + 1, decoder_width) * 0.02)
        self.decoder = nn.Sequential(
            *(Block(decoder_width, decoder_heads, qkv_bias=True) for _ in range(decoder_depth)),
            nn.LayerNorm(decoder_width),
            nn.Linear(decoder_width, channels * self.patch_size**2),
        )
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Mean squared error over the hidden patches, each normalised by its own mean and deviation.

        Args:
            images: (batch, channels, size, size).
        """
        batch = images.shape[0]
        order = draws.of_examples(
            batch, lambda count: torch.rand(count, self.patches, device=images.device)
        ).argsort(dim=1)
        decoded = self._decode(self._encode(images, order[:, : self.visible]), order)
        error = (decoded - self.targets(images)).square().mean(dim=-1)
        hidden = torch.ones_like(error).scatter(1, order[:, : self.visible], 0.0)
        return (error * hidden).sum() / hidden.sum()

    def targets(self, images: Tensor) -> Tensor:
        """Pixels by patch, normalised within each patch: (batch, patches, channels * patch_size^2)."""
        batch, channels, size, _ = images.shape
        grid = size // self.patch_size
        patches = images.reshape(batch, channels, grid, self.patch_size, grid, self.patch_size)
        patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, self.patches, -1)
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()

    def _encode(self, images: Tensor, visible: Tensor) -> Tensor:
        encoder = self.encoder
        tokens = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
        tokens = tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[-1]))
        class_token = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(images), -1, -1)
        tokens = torch.cat([class_token, tokens], dim=1)
        if encoder.grad_checkpointing:  # see set_grad_checkpointing, which the blocks alone do not know of
            return self.norm(checkpoint_seq(encoder.blocks, tokens))
        return self.norm(encoder.blocks(tokens))

    def _decode(self, latent: Tensor, order: Tensor) -> Tensor:
        latent = self.to_decoder(latent)
        masks = self.mask_token.expand(len(latent), self.patches - self.visible, -1)
        shuffled = torch.cat([latent[:, 1:], masks], dim=1)
        place = order.argsort(dim=1)[..., None].expand(-1, -1, shuffled.shape[-1])
        tokens = torch.cat([latent[:, :1], shuffled.gather(1, place)], dim=1) + self.decoder_positions
        return self.decoder(tokens)[:, 1:]
