"""The adaptation plan: what a checkpoint of nnssl tells nnU-Net, which builds a network by it and fills it.

Names and types of the fields are those of nnssl's `AdaptationPlan`, `ArchitecturePlans`, `DynamicArchitecturePlans`,
`Plan` and `ConfigurationPlan` in serialised form; docs/checkpoints.md tells which of them nnU-Net reads.
"""

from __future__ import annotations

from typing import Any

from .model import PRESETS

# Sizes that nnssl and nnU-Net know by name; all others are described by the arguments of their class.
NAMED_ARCHITECTURES = {"resenc-l": "ResEncL"}

CITATIONS: list[dict[str, Any]] = [
    {
        "type": "Architecture",
        "name": "ResEnc U-Net",
        "apa_citations": [
            "Isensee, F., Wald, T., Ulrich, C., Baumgartner, M., Roy, S., Maier-Hein, K., & Jaeger, P. F. (2024). "
            "nnU-Net revisited: A call for rigorous validation in 3D medical image segmentation. MICCAI."
        ],
    },
    {
        "type": "Pretraining Method",
        "name": "S3D",
        "apa_citations": [
            "Wald, T., Ulrich, C., Lukyanenko, S., Goncharov, A., Paderno, A., ... & Maier-Hein, K. "
            "(2025). Revisiting MAE pre-training for 3D medical image segmentation. CVPR.",
            "Tian, K., Jiang, Y., Diao, Q., Lin, C., Wang, L., & Yuan, Z. (2023). Designing BERT for convolutional "
            "networks: Sparse and hierarchical masked modeling. ICLR.",
        ],
    },
]


def adaptation_plan(config: dict[str, Any]) -> dict[str, Any]:
    """The plan of a checkpoint, in plain types.

    Args:
        config: "config" of the checkpoint; its `preset`, `patch_size` (voxels) and `spacing_mm` (one number or
            three, as the axes of the patch) are read.
    Raises:
        ValueError: a setting is missing, as in imported checkpoints of which nothing but the weights is known.
    """
    missing = [name for name in ("preset", "patch_size", "spacing_mm") if name not in config]
    if missing:
        raise ValueError(f"the adaptation plan needs {', '.join(missing)}, which the checkpoint does not tell")
    patch_size, spacing_mm = [int(side) for side in config["patch_size"]], config["spacing_mm"]
    spacing = [float(side) for side in (spacing_mm if isinstance(spacing_mm, list) else [spacing_mm] * 3)]
    style = ("onemmiso" if spacing[0] == 1 else "isotropic") if len(set(spacing)) == 1 else "noresample"
    return {
        "architecture_plans": _architecture(config["preset"]),
        "pretrain_plan": {
            "dataset_name": "s3d",
            "plans_name": "s3d",
            "original_median_spacing_after_transp": spacing,
            "image_reader_writer": "NibabelIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {style: _configuration(style, patch_size, spacing)},
            "experiment_planner_used": "s3d",
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": patch_size,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        "key_to_lpe": None,
    }


def _architecture(preset: str) -> dict[str, Any]:
    """The network as `s3d.model.build_unet` makes it: by name where it has one, otherwise by class and arguments."""
    if preset in NAMED_ARCHITECTURES:
        name, arguments, classes = NAMED_ARCHITECTURES[preset], None, None
    else:
        name, arguments, classes = "ResidualEncoderUNet", _arguments(preset), ["conv_op", "norm_op", "nonlin"]
    return {"arch_class_name": name, "arch_kwargs": arguments, "arch_kwargs_requiring_import": classes}


def _arguments(preset: str) -> dict[str, Any]:
    size = PRESETS[preset]
    stages = len(size.features)
    return {
        "n_stages": stages,
        "features_per_stage": list(size.features),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[size.kernel_size] * 3 for _ in range(stages)],
        "strides": [[stride] * 3 for stride in size.strides],
        "n_blocks_per_stage": list(size.blocks),
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.modules.activation.LeakyReLU",
        "nonlin_kwargs": {"negative_slope": 0.01, "inplace": True},
    }


def _configuration(style: str, patch_size: list[int], spacing: list[float]) -> dict[str, Any]:
    """How volumes were preprocessed. nnU-Net reads spacing and patch size; the rest is what nnssl's class requires."""
    return {
        "data_identifier": f"s3d_{style}",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": style,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
        "resampling_fn_mask": "resample_data_or_seg_to_shape",
        "resampling_fn_mask_kwargs": {"is_seg": True, "order": 0, "order_z": 0, "force_separate_z": None},
        "spacing": spacing,
        "patch_size": patch_size,
    }
