"""The cost model: FLOPs of each part as formulas in the letters of the method's description, B images at once.

B images, L patches, K levels, D joint width, W vision width, S image side, g patches along a side, P class tokens, N
learnable tokens, M tokens of a template's shared prefix. A product of n × m with m × k counts 2nmk; what is elementwise
does not count. A compiler's own count is held against these in tests.
"""

from iqe_jax.models.iqe_clip import IqeClip


def tower(model: IqeClip, images: int) -> float:
    """Image tower, forward: B·[layers·(24·T·W² + 4·T²·W) + 2·L·3p²·W + 2·W·D] with T = L + 1 tokens, patches p wide."""
    clip, patches, width = model.clip, model.grid**2, model.clip.vision_width
    tokens = patches + 1
    blocks = clip.vision_layers * (24 * tokens * width**2 + 4 * tokens**2 * width)
    ends = 2 * patches * 3 * clip.patch_size**2 * width + 2 * width * clip.embed_dim
    return float(images * (blocks + ends))


def text(model: IqeClip, images: int) -> float:
    """Prompted text tower, forward: layers·[2·R·12·D² + attention] over R = 2·(M + B·P) − C rows; the last projection.

    M does not grow with B: the prefix is worked off once. C of its rows are the same in both templates.
    """
    clip, config, dim = model.clip, model.config, model.clip.embed_dim
    prefix, own = max(map(len, model.templates.ids)) + config.learnable_tokens, config.prompt_len
    common = model.templates.common + config.learnable_tokens
    rows = 2 * (prefix + images * own) - common
    attention = 2 * 4 * dim * (prefix**2 + images * own * (prefix + own))
    learnable = 2 * model.prompt_depth * config.learnable_tokens * dim**2
    return float(clip.text_layers * (24 * rows * dim**2 + attention) + 2 * images * 2 * dim**2 + learnable)


def dense(model: IqeClip, images: int) -> float:
    """Linear layers of the levels, forward: B·K·2·L·W·D. The way back costs as much again: features are frozen."""
    return float(images * len(model.config.levels) * 2 * model.grid**2 * model.clip.vision_width * model.clip.embed_dim)


def query_module(model: IqeClip, images: int) -> float:
    """IQM, forward: B·K·layers·[2·2·(3·4·D² + 2·D·width) + 4·L·2·heads·D + attention among queries and to the text]."""
    config, dim = model.config, model.clip.embed_dim
    # Folded or not, each of three attentions has four products with D × D kernels for two queries; the text's keys and
    # values are two rows as well.
    products = 2 * 2 * (12 * dim**2 + 2 * dim * config.iqm_width)
    patches = 4 * model.grid**2 * 2 * config.iqm_heads * dim
    short = 2 * 4 * 2 * 2 * dim
    return float(images * len(config.levels) * config.iqm_layers * (products + patches + short))


def maps(model: IqeClip, images: int) -> float:
    """Both branches' maps: B·2·K·2·(S·g² + S²·g), and for the segmentation a blur of B·4·S³."""
    side, grid = model.config.image_size, model.grid
    return float(images * (2 * len(model.config.levels) * 2 * (side * grid**2 + side**2 * grid) + 4 * side**3))


def head(model: IqeClip, images: int) -> float:
    """From features to segmentation and scores, with the logits: B·K·L·2·2·D."""
    logits = images * len(model.config.levels) * model.grid**2 * 4 * model.clip.embed_dim
    parts = (text, dense, query_module, maps)
    return logits + sum(part(model, images) for part in parts)
