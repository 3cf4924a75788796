"""Sizes of the models that the presets name, so that a plan needs no download; others from a config.json."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from openblip2.errors import UserError, one_line


def _vit_g() -> Any:
    """EVA-CLIP ViT-g/14 as it is published for BLIP-2: 39 of its 40 layers."""
    from transformers import Blip2VisionConfig

    return Blip2VisionConfig(
        hidden_size=1408, intermediate_size=6144, num_attention_heads=16, num_hidden_layers=39, image_size=224,
        patch_size=14, qkv_bias=True,
    )  # fmt: skip


def _vit_l() -> Any:
    """CLIP's ViT-L/14: 24 layers."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24, image_size=224,
        patch_size=14,
    )  # fmt: skip


def _dinov2_small() -> Any:
    from transformers import Dinov2Config

    return Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518,
        use_mask_token=False,
    )  # fmt: skip


def _efficientnet() -> Any:
    from openblip2.model.efficientnet import EfficientNetLiteConfig, known_to_transformers

    known_to_transformers()
    return EfficientNetLiteConfig()


def _opt(width: int) -> Callable[[], Any]:
    def config() -> Any:
        from transformers import OPTConfig

        return OPTConfig(
            vocab_size=50272, hidden_size=width, ffn_dim=4 * width, num_hidden_layers=32, num_attention_heads=32,
            max_position_embeddings=2048, word_embed_proj_dim=width,
        )  # fmt: skip

    return config


def _flan_t5(width: int, ffn: int, heads: int) -> Callable[[], Any]:
    def config() -> Any:
        from transformers import T5Config

        return T5Config(
            vocab_size=32128, d_model=width, d_ff=ffn, d_kv=64, num_heads=heads, num_layers=24,
            num_decoder_layers=24, feed_forward_proj="gated-gelu", tie_word_embeddings=False,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip

    return config


def _smollm2() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip


ENCODERS: dict[str, Callable[[], Any]] = {
    "Salesforce/blip2-itm-vit-g": _vit_g,
    "openai/clip-vit-large-patch14": _vit_l,
    "wheel:dinov2-small": _dinov2_small,
    "wheel:efficientnet-lite0": _efficientnet,
}
LANGUAGES: dict[str, Callable[[], Any]] = {
    "facebook/opt-2.7b": _opt(2560),
    "facebook/opt-6.7b": _opt(4096),
    "google/flan-t5-xl": _flan_t5(2048, 5120, 32),
    "google/flan-t5-xxl": _flan_t5(4096, 10240, 64),
    "wheel:smollm2-135m-instruct": _smollm2,
}
# As `model.bert.bert_sizes` gives them: the vocabulary with `[DEC]`.
BERTS = {
    "google-bert/bert-base-uncased": {
        "width": 768, "layers": 12, "heads": 12, "ffn": 3072, "vocabulary": 30523, "positions": 512,
    },
    "wheel:minilm-l6": {
        "width": 384, "layers": 6, "heads": 12, "ffn": 1536, "vocabulary": 30523, "positions": 512,
    },
}  # fmt: skip


def encoder_config(name: str) -> Any:
    """Configuration of an image encoder, by name or from a directory; of a larger model its vision part.

    Raises:
        UserError: its sizes are not known here, or it is no image encoder.
    """
    if name in ENCODERS:
        return ENCODERS[name]()
    config = _from_directory("vision.name", name, ENCODERS)
    config = config.vision_config if "vision_config" in config.sub_configs else config
    if not {"image_size", "patch_size", "num_hidden_layers"} <= config.to_dict().keys():
        raise UserError(f"vision.name {name!r} is a {config.model_type!r}: it needs a vision transformer")
    return config


def language_config(name: str) -> Any:
    """Configuration of a language model, by name or from a directory; of a BLIP-2 its language part.

    Raises:
        UserError: its sizes are not known here.
    """
    if name in LANGUAGES:
        return LANGUAGES[name]()
    config = _from_directory("language.name", name, LANGUAGES)
    return config.text_config if "qformer_config" in config.sub_configs else config


def bert_sizes(name: str) -> dict[str, int]:
    """Sizes of a BERT as arguments of `Former`.

    Raises:
        UserError: they are not known here, or it is no BERT.
    """
    if name in BERTS:
        return BERTS[name]
    from openblip2.model.bert import bert_sizes as read

    _require_directory("qformer.start", name, BERTS)
    return read(name)


def untied(config: Any) -> bool:
    """Whether a T5's output embedding is one of its own, as FlanT5's; transformers ties it, whatever it is told."""
    return config.model_type == "t5" and not config.scale_decoder_outputs


def _from_directory(setting: str, name: str, known: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    _require_directory(setting, name, known)
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{setting} {name!r} cannot be read: {one_line(error)}") from error


def _require_directory(setting: str, name: str, known: dict[str, Any]) -> None:
    if not (Path(name) / "config.json").is_file():
        raise UserError(
            f"{setting} {name!r}: its sizes are not known here, and nothing is downloaded for a plan: give a directory "
            f"with its config.json, or one of {', '.join(known)}"
        )
