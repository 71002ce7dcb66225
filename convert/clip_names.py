"""The tensor names of CLIP in its two public spellings, OpenAI's and Hugging Face's, as conversion tables.

OpenAI's names are those of its own archives, of open_clip's files and of plain state dicts. Both tables lead to the
one tree that iqe_jax/models/clip.py declares. How tables are read is the engine's business.
"""

from convert.engine import Rule, Sizes, Table

HEAD_WIDTH = 64  # in every CLIP ViT that this project's towers can run


def _norm(theirs: str, ours: str, dim: str) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", f"{ours}/scale", f"{dim} -> {dim}"),
        Rule(f"{theirs}.bias", f"{ours}/bias", f"{dim} -> {dim}"),
    ]


def _linear(theirs: str, ours: str, dims: tuple[str, str]) -> list[Rule]:
    """PyTorch keeps (out, in), we keep (in, out)."""
    into, out = dims
    return [
        Rule(f"{theirs}.weight", f"{ours}/kernel", f"{out} {into} -> {into} {out}"),
        Rule(f"{theirs}.bias", f"{ours}/bias", f"{out} -> {out}"),
    ]


def _openai_block(theirs: str, ours: str, dim: str, heads: str) -> list[Rule]:
    qkv, out = f"3 {heads} 64", f"{heads} 64"
    return [
        *_norm(f"{theirs}.ln_1", f"{ours}/ln_1", dim),
        Rule(f"{theirs}.attn.in_proj_weight", f"{ours}/attn/qkv/kernel", f"({qkv}) {dim} -> {dim} {qkv}"),
        Rule(f"{theirs}.attn.in_proj_bias", f"{ours}/attn/qkv/bias", f"({qkv}) -> {qkv}"),
        Rule(f"{theirs}.attn.out_proj.weight", f"{ours}/attn/out/kernel", f"{dim} ({out}) -> {out} {dim}"),
        Rule(f"{theirs}.attn.out_proj.bias", f"{ours}/attn/out/bias", f"{dim} -> {dim}"),
        *_norm(f"{theirs}.ln_2", f"{ours}/ln_2", dim),
        *_linear(f"{theirs}.mlp.c_fc", f"{ours}/mlp/fc", (f"{dim}'", f"(4 {dim})")),
        *_linear(f"{theirs}.mlp.c_proj", f"{ours}/mlp/proj", (f"(4 {dim}')", dim)),
    ]


def _hugging_face_block(theirs: str, ours: str, dim: str, heads: str) -> list[Rule]:
    qkv, out = f"3 {heads} 64", f"{heads} 64"
    weights, biases = (tuple(f"{theirs}.self_attn.{k}_proj.{kind}" for k in "qkv") for kind in ("weight", "bias"))
    return [
        *_norm(f"{theirs}.layer_norm1", f"{ours}/ln_1", dim),
        Rule(weights, f"{ours}/attn/qkv/kernel", f"({qkv}) {dim} -> {dim} {qkv}"),
        Rule(biases, f"{ours}/attn/qkv/bias", f"({qkv}) -> {qkv}"),
        Rule(f"{theirs}.self_attn.out_proj.weight", f"{ours}/attn/out/kernel", f"{dim} ({out}) -> {out} {dim}"),
        Rule(f"{theirs}.self_attn.out_proj.bias", f"{ours}/attn/out/bias", f"{dim} -> {dim}"),
        *_norm(f"{theirs}.layer_norm2", f"{ours}/ln_2", dim),
        *_linear(f"{theirs}.mlp.fc1", f"{ours}/mlp/fc", (f"{dim}'", f"(4 {dim})")),
        *_linear(f"{theirs}.mlp.fc2", f"{ours}/mlp/proj", (f"(4 {dim}')", dim)),
    ]


def _derive(sizes: Sizes) -> Sizes:
    """Head counts and the grid, which no tensor has as an axis of its own."""
    derived = {}
    for width, heads, tower in (("width", "vision_heads", "image"), ("dim", "text_heads", "text")):
        if width in sizes:
            derived[heads], rest = divmod(sizes[width], HEAD_WIDTH)
            if rest or not derived[heads]:
                raise ValueError(f"the {tower} tower is {sizes[width]} wide, expected a multiple of {HEAD_WIDTH}")
    if "tokens" in sizes:
        derived["grid"] = round(max(sizes["tokens"] - 1, 0) ** 0.5)
        if derived["grid"] ** 2 + 1 != sizes["tokens"] or not derived["grid"]:
            raise ValueError(f"the image position table has {sizes['tokens']} rows, expected 1 + a square number")
    return derived


OPENAI = Table(
    "a CLIP ViT under OpenAI's names",
    (
        Rule("visual.conv1.weight", "vision/patch_embedding/kernel", "width 3 patch patch' -> patch patch' 3 width"),
        Rule("visual.class_embedding", "vision/class_embedding", "width -> width"),
        Rule("visual.positional_embedding", "vision/position_embedding", "tokens width -> tokens width"),
        *_norm("visual.ln_pre", "vision/ln_pre", "width"),
        *_openai_block("visual.transformer.resblocks.{vision}", "vision/block_{vision}", "width", "vision_heads"),
        *_norm("visual.ln_post", "vision/ln_post", "width"),
        Rule("visual.proj", "vision/proj/kernel", "width dim -> width dim"),
        Rule("token_embedding.weight", "text/token_embedding", "vocab dim -> vocab dim"),
        Rule("positional_embedding", "text/position_embedding", "context dim -> context dim"),
        *_openai_block("transformer.resblocks.{text}", "text/block_{text}", "dim", "text_heads"),
        *_norm("ln_final", "text/ln_final", "dim"),
        Rule("text_projection", "text/proj/kernel", "dim dim' -> dim dim'"),
        Rule("logit_scale", "logit_scale", "->"),
    ),
    _derive,
    ("input_resolution", "context_length", "vocab_size"),
)

HUGGING_FACE = Table(
    "a CLIP ViT under Hugging Face's names",
    (
        Rule(
            "vision_model.embeddings.patch_embedding.weight",
            "vision/patch_embedding/kernel",
            "width 3 patch patch' -> patch patch' 3 width",
        ),
        Rule("vision_model.embeddings.class_embedding", "vision/class_embedding", "width -> width"),
        Rule(
            "vision_model.embeddings.position_embedding.weight",
            "vision/position_embedding",
            "tokens width -> tokens width",
        ),
        *_norm("vision_model.pre_layrnorm", "vision/ln_pre", "width"),  # their spelling
        *_hugging_face_block("vision_model.encoder.layers.{vision}", "vision/block_{vision}", "width", "vision_heads"),
        *_norm("vision_model.post_layernorm", "vision/ln_post", "width"),
        Rule("visual_projection.weight", "vision/proj/kernel", "dim width -> width dim"),
        Rule("text_model.embeddings.token_embedding.weight", "text/token_embedding", "vocab dim -> vocab dim"),
        Rule(
            "text_model.embeddings.position_embedding.weight", "text/position_embedding", "context dim -> context dim"
        ),
        *_hugging_face_block("text_model.encoder.layers.{text}", "text/block_{text}", "dim", "text_heads"),
        *_norm("text_model.final_layer_norm", "text/ln_final", "dim"),
        Rule("text_projection.weight", "text/proj/kernel", "dim' dim -> dim dim'"),
        Rule("logit_scale", "logit_scale", "->"),
    ),
    _derive,
    (r"(text|vision)_model\.embeddings\.position_ids",),
)
