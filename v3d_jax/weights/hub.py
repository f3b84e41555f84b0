"""The JSON files of a diffusers folder of Stable Video Diffusion, from a generator's settings.

Keys and classes are those that diffusers' `StableVideoDiffusionPipeline` reads.
"""

from typing import Any

from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.nn.autoencoder import AutoencoderConfig
from v3d_jax.nn.clip import CLIP_MEAN, CLIP_STD, VisionConfig
from v3d_jax.nn.generator import GeneratorConfig
from v3d_jax.nn.unet import UNetConfig


def configs(config: GeneratorConfig, sampling: SamplingConfig) -> dict[str, dict[str, Any]]:
    """Every JSON file of the folder by its path there."""
    height, width = (side // config.autoencoder.factor for side in config.frame_size)
    return {
        "model_index.json": {
            "_class_name": "StableVideoDiffusionPipeline",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
            "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
        },
        "unet/config.json": _unet(config, max(height, width)),
        "vae/config.json": _autoencoder(config.autoencoder, max(config.frame_size)),
        "image_encoder/config.json": _vision(config.vision),
        "scheduler/scheduler_config.json": _scheduler(sampling),
        "feature_extractor/preprocessor_config.json": _preprocessor(config.vision.image_size),
    }


def _unet(config: GeneratorConfig, side: int) -> dict[str, Any]:
    unet: UNetConfig = config.unet
    attending = [unet.has_attention(level) for level in range(len(unet.widths))]
    kinds = [f"{'CrossAttn' if attends else ''}{{}}BlockSpatioTemporal" for attends in attending]
    return {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "addition_time_embed_dim": config.conditioner.dim,
        "block_out_channels": list(unet.widths),
        "cross_attention_dim": unet.context_dim,
        "down_block_types": [kind.format("Down") for kind in kinds],
        "in_channels": unet.in_channels,
        "layers_per_block": unet.num_res_blocks,
        "num_attention_heads": [max(1, width // unet.head_channels) for width in unet.widths],
        "num_frames": config.num_frames,
        "out_channels": unet.out_channels,
        "projection_class_embeddings_input_dim": unet.vector_dim,
        "sample_size": side,
        "transformer_layers_per_block": 1,
        "up_block_types": [kind.format("Up") for kind in reversed(kinds)],
    }


def _autoencoder(config: AutoencoderConfig, side: int) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKLTemporalDecoder",
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * len(config.widths),
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.num_res_blocks,
        "out_channels": 3,
        "sample_size": side,
        "scaling_factor": config.scale_factor,
    }


def _vision(config: VisionConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": config.width,
        "image_size": config.image_size,
        "intermediate_size": config.mlp,
        "layer_norm_eps": 1e-5,
        "model_type": "clip_vision_model",
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "num_hidden_layers": config.layers,
        "patch_size": config.patch,
        "projection_dim": config.output_dim,
    }


def _preprocessor(size: int) -> dict[str, Any]:
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(CLIP_MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(CLIP_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def _scheduler(config: SamplingConfig) -> dict[str, Any]:
    """EDM's noise levels, whose rho is 7 there, and v-prediction; the betas are not used."""
    return {
        "_class_name": "EulerDiscreteScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "sigma_max": config.sigma_max,
        "sigma_min": config.sigma_min,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "timestep_type": "continuous",
        "use_karras_sigmas": True,
    }
