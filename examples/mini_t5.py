"""T5 in one page: two encoder layers, two decoder layers, one embedding matrix used three ways.

This is T5 v1.0 (Raffel et al. 2020) with nothing but its mathematics, to be read from top to bottom. Three things set
it apart from the original Transformer: positions are a learned bias on the attention scores, by distance; the norm
comes before each sub-layer and only rescales; attention scores are not divided by sqrt(d).

Shapes: b batch, s sequence (q of queries, k of keys), h hidden, n heads, d channels of a head, v vocabulary.
`python examples/mini_t5.py` learns to fill in the blanks of one sentence.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, HIDDEN, HEADS, HEAD_DIM, INNER, LAYERS, BUCKETS, MAX_DISTANCE = 128, 64, 4, 16, 256, 2, 32, 128


class RMSNorm(nn.Module):
    """Divide by the root mean square over the channels; no mean, no bias."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x):
        """[b, s, h] -> [b, s, h]"""
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class PositionBias(nn.Module):
    """A learned number for each head and bucket of distances, added to the attention scores of every layer."""

    def __init__(self, causal):
        super().__init__()
        self.causal = causal
        self.table = nn.Parameter(torch.randn(HEADS, BUCKETS) * HIDDEN**-0.5)

    def bucket(self, distance):
        """Near distances have a bucket each; far ones share buckets that grow logarithmically."""
        if self.causal:
            buckets, first, distance = BUCKETS, 0, (-distance).clamp(min=0)
        else:  # the second half of the buckets is for keys after the query
            buckets, first, distance = BUCKETS // 2, (distance > 0) * (BUCKETS // 2), distance.abs()
        exact = buckets // 2
        growth = torch.log(distance.clamp(min=1) / exact) / math.log(MAX_DISTANCE / exact)
        far = (exact + growth * (buckets - exact)).long().clamp(max=buckets - 1)
        return first + torch.where(distance < exact, distance, far)

    def forward(self, s):
        """Length s -> [n, q, k]"""
        distance = torch.arange(s) - torch.arange(s)[:, None]  # key - query, [q, k]
        bias = self.table[:, self.bucket(distance)]
        return bias.masked_fill(distance > 0, -torch.inf) if self.causal else bias


class Attention(nn.Module):
    """Multi-head attention; self-attention when queries and memory are the same."""

    def __init__(self):
        super().__init__()
        self.q = nn.Parameter(torch.randn(HEADS, HEAD_DIM, HIDDEN) * (HIDDEN * HEAD_DIM) ** -0.5)
        self.k = nn.Parameter(torch.randn(HEADS, HEAD_DIM, HIDDEN) * HIDDEN**-0.5)
        self.v = nn.Parameter(torch.randn(HEADS, HEAD_DIM, HIDDEN) * HIDDEN**-0.5)
        self.o = nn.Parameter(torch.randn(HIDDEN, HEADS, HEAD_DIM) * (HEADS * HEAD_DIM) ** -0.5)

    def forward(self, x, memory, bias):
        """[b, q, h], [b, k, h], [n, q, k] -> [b, q, h]"""
        q = torch.einsum("bqh,ndh->bnqd", x, self.q)
        k = torch.einsum("bkh,ndh->bnkd", memory, self.k)
        v = torch.einsum("bkh,ndh->bnkd", memory, self.v)
        weights = torch.softmax(q @ k.mT + bias, dim=-1)  # [b, n, q, k]
        return torch.einsum("bnqd,hnd->bqh", weights @ v, self.o)


class Layer(nn.Module):
    """Self-attention, cross-attention in the decoder, feed-forward: each x + f(norm(x))."""

    def __init__(self, decoder):
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm() for _ in range(3 if decoder else 2))
        self.self_attention = Attention()
        self.cross_attention = Attention() if decoder else None
        self.wi = nn.Parameter(torch.randn(INNER, HIDDEN) * HIDDEN**-0.5)
        self.wo = nn.Parameter(torch.randn(HIDDEN, INNER) * INNER**-0.5)

    def forward(self, x, bias, memory=None):
        """[b, s, h] -> [b, s, h]"""
        y = self.norms[0](x)
        x = x + self.self_attention(y, y, bias)
        if self.cross_attention is not None:
            x = x + self.cross_attention(self.norms[1](x), memory, 0.0)
        return x + F.relu(self.norms[-1](x) @ self.wi.T) @ self.wo.T


class Stack(nn.Module):
    """Layers that share one position bias, and a last norm."""

    def __init__(self, decoder):
        super().__init__()
        self.bias = PositionBias(causal=decoder)
        self.layers = nn.ModuleList(Layer(decoder) for _ in range(LAYERS))
        self.norm = RMSNorm()

    def forward(self, x, memory=None):
        """[b, s, h] -> [b, s, h]"""
        bias = self.bias(x.shape[1])
        for layer in self.layers:
            x = layer(x, bias, memory)
        return self.norm(x)


class MiniT5(nn.Module):
    """The embedding reads the encoder's tokens, reads the decoder's tokens, and scores the next token."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(VOCAB, HIDDEN))
        self.encoder = Stack(decoder=False)
        self.decoder = Stack(decoder=True)

    def forward(self, encoder_ids, decoder_ids):
        """[b, s], [b, t] -> logits [b, t, v]"""
        memory = self.encoder(self.embedding[encoder_ids])
        return self.decoder(self.embedding[decoder_ids], memory) * HIDDEN**-0.5 @ self.embedding.T


def main():
    """Overfit one span-corrupted sentence; ids are ASCII codes, <, = and > are the sentinels."""
    torch.manual_seed(0)
    model = MiniT5()
    inputs = torch.tensor([list(b"Thank you < me to your party = week.")])
    labels = torch.tensor([list(b"<for inviting=last>")])
    decoder_ids = F.pad(labels, (1, -1))  # shifted right by one, starting with the pad id 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(51):
        logits = model(inputs, decoder_ids)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if step % 10 == 0:
            print(f"step {step:2d}  loss {loss.item():6.3f}  {bytes(logits.argmax(-1)[0].tolist())}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"logits {list(logits.shape)}, {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
