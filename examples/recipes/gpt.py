"""A small GPT for the recipe of nanoGPT's loop."""

import torch
from torch import Tensor, nn


class GPT(nn.Module):
    """Two causal transformer layers over 128 tokens.

    Args:
        length: Number of tokens in its context.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(128, 64), nn.Parameter(torch.zeros(length, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(64, 128, bias=False)
        self.mask = nn.Transformer.generate_square_subsequent_mask(length)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next tokens."""
        return self.head(self.body(self.token(tokens) + self.place, self.mask))
