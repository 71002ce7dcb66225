"""IQE-CLIP's head in textbook PyTorch, for peers.py: prompts, text tower, query module, maps, losses; random weights.

Nothing is shared, folded or left out because it cancels. Images are batched, which the official code does not do.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from iqe_jax.models.iqe_clip import IqeClip, blur_matrix


class Attention(nn.Module):
    """Multi-head attention with projections of its own for query, key, value and output."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: torch.Tensor, context: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
        """Attend from `x` (B, T, D) to `context` (B, C, D)."""

        def split(tokens: torch.Tensor) -> torch.Tensor:
            return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(context)), split(self.value(context))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(attended.transpose(1, 2).flatten(2))


class TextBlock(nn.Module):
    """A pre-norm block of CLIP's text tower."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.fc, self.proj = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) → (B, T, D)."""
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, causal=True)
        return x + self.proj(F.gelu(self.fc(self.ln_2(x))))


class QueryLayer(nn.Module):
    """A post-norm layer of the query module."""

    def __init__(self, dim: int, heads: int, width: int):
        super().__init__()
        self.steps = nn.ModuleList(Attention(dim, heads) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-12) for _ in range(4))
        self.fc, self.proj = nn.Linear(dim, width), nn.Linear(width, dim)

    def forward(self, x: torch.Tensor, patches: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Queries (B, 2, D) read themselves, patches (B, L, D) and text (B, 2, D)."""
        x = self.norms[0](x + self.steps[0](x, x))
        x = self.norms[1](x + self.steps[1](x, patches))
        x = self.norms[2](x + self.steps[2](x, text))
        return self.norms[3](x + self.proj(F.gelu(self.fc(x))))


class TextbookHead(nn.Module):
    """All from patch tokens to logits, with CLIP's text tower frozen inside."""

    def __init__(self, model: IqeClip):
        super().__init__()
        clip, config, dim = model.clip, model.config, model.clip.embed_dim
        self.grid, self.side, self.fusion = model.grid, config.image_size, config.fusion_weight
        self.dense = nn.ModuleList(nn.Linear(clip.vision_width, dim) for _ in config.levels)
        self.class_conv = nn.Conv1d(1, config.prompt_len, 3, padding=1)
        self.query_conv = nn.Conv1d(1, 2, 3, padding=1)
        self.prompt_query = nn.Parameter(0.02 * torch.randn(1, config.prompt_len, dim))
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, 2, dim))
        self.learnable = nn.Parameter(0.02 * torch.randn(model.prompt_depth, config.learnable_tokens, dim))
        self.prompt_proj, self.prompt_norm = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=1e-6)
        self.prompt_temp = nn.Parameter(torch.tensor(2.66))
        self.iqm_norm = nn.LayerNorm(dim, eps=1e-12)
        self.iqm = nn.ModuleList(QueryLayer(dim, config.iqm_heads, config.iqm_width) for _ in range(config.iqm_layers))
        text = nn.ModuleList(TextBlock(dim, clip.text_heads) for _ in range(clip.text_layers))
        self.text, self.ln_final, self.text_proj = text, nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False)
        for module in (self.text, self.ln_final, self.text_proj):
            module.requires_grad_(False)
        self.register_buffer("position", 0.02 * torch.randn(clip.context_length, dim))
        self.register_buffer("tokens", 0.02 * torch.randn(2, max(map(len, model.templates.ids)), dim))
        self.register_buffer("blur", torch.from_numpy(blur_matrix(config.image_size, config.sigma)))

    def embed(self, template: int, class_tokens: torch.Tensor) -> torch.Tensor:
        """One template's text embedding of each image, (B, D), over the whole context as CLIP pads it."""
        batch, count = len(class_tokens), self.learnable.shape[1]
        words: Any = self.tokens[template]  # pyright: ignore[reportIndexIssue]
        position: Any = self.position
        x = torch.cat([words.expand(batch, -1, -1), class_tokens], 1)
        read = x.shape[1] + count - 1
        x = F.pad(x, (0, 0, 0, len(position) - count - x.shape[1])) + position[: len(position) - count]
        slots = self.prompt_proj(self.learnable)
        x = torch.cat([x[:, :1], slots[0].expand(batch, -1, -1), x[:, 1:]], 1)
        for i, block in enumerate(self.text):
            if 0 < i < len(slots):
                x = torch.cat([x[:, :1], slots[i].expand(batch, -1, -1), x[:, 1 + count :]], 1)
            x = block(x)
        return F.normalize(self.text_proj(self.ln_final(self.prompt_norm(x)))[:, read], dim=-1)

    def texts(self, image_features: torch.Tensor) -> torch.Tensor:
        """Both templates' text embeddings (B, 2, D) from (B, D)."""
        class_tokens = self.prompt_query + self.class_conv(image_features[:, None])
        return torch.stack([self.embed(t, class_tokens) for t in (0, 1)], 1)

    def queries(self, image_features: torch.Tensor, patches: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Query features (B, 2, D) of one level's dense features (B, L, D)."""
        x = self.iqm_norm(self.query_tokens + self.query_conv(image_features[:, None]))
        for block in self.iqm:
            x = block(x, patches, text)
        return x

    def forward(self, patch_tokens: torch.Tensor, image_features: torch.Tensor) -> list[list[torch.Tensor]]:
        """Logits (B, L, 2) of each level from (K, B, L, W) and (B, D): the query branch's, then the text branch's."""
        text = self.texts(image_features)
        branches: list[list[torch.Tensor]] = [[], []]
        for tokens, layer in zip(patch_tokens, self.dense, strict=True):
            patches = layer(tokens)
            x, unit = self.queries(image_features, patches, text), F.normalize(patches, dim=-1)
            branches[0].append(unit @ F.normalize(x, dim=-1).transpose(1, 2))
            branches[1].append(self.prompt_temp.exp() * unit @ text.transpose(1, 2))
        return branches

    def maps(self, logits: torch.Tensor) -> torch.Tensor:
        """Both channels (B, 2, S, S) of one level's logits."""
        grid = logits.transpose(1, 2).unflatten(-1, (self.grid, self.grid))
        return F.interpolate(grid, self.side, mode="bilinear", align_corners=True).softmax(1)

    def segment(self, branches: list[list[torch.Tensor]]) -> torch.Tensor:
        """The fused and blurred segmentation (B, S, S)."""
        query, text = (sum(self.maps(x)[:, 1] for x in branch) / len(branch) for branch in branches)
        blur: Any = self.blur
        return blur @ (self.fusion * query + (1 - self.fusion) * text) @ blur.T


def loss(head: TextbookHead, branches: list[list[torch.Tensor]], masks: torch.Tensor, labels: torch.Tensor) -> Any:
    """Detection, focal and dice of every branch and level, added up."""
    total: Any = 0
    anomalous = (masks > 0.5).to(masks.dtype)
    onehot = torch.stack([1 - anomalous, anomalous], 1).clamp(1e-5, 1 - 1e-5)
    for logits in [x for branch in branches for x in branch]:
        total = total + F.binary_cross_entropy_with_logits(logits.softmax(-1)[..., 1].mean(1), labels)
        maps = head.maps(logits)
        p = (onehot * maps).sum(1) + 1e-5
        total = total - ((1 - p) ** 2 * p.log()).mean()
        overlap, size = (maps[:, 1] * anomalous).sum((1, 2)), (maps[:, 1] + anomalous).sum((1, 2))
        total = total + (1 - (2 * overlap + 1) / (size + 1)).mean()
    return total
