"""Image processors: one class for all towers, with the fields of a tower or a file, or the user's own class.

`LlavaImageProcessor` (PIL backend) equals CLIP's, SigLIP's and DINOv2's own processors once its fields are set. So all
checkpoints have the same class, unless the recipe names another:

    vision_tower: {name: ..., image_processor: my_processor/preprocessor_config.json}
    vision_tower: {name: ..., image_processor: my_pkg.my_module:MyImageProcessor}

Your class is a subclass of transformers' image processors (docs/images.md shows one) and needs no arguments. It turns
every image into `pixel_values` [3, S, S] with the same side S, normalised with its `image_mean` and `image_std`. With
`do_rescale=False, do_normalize=False` the values stay in 0..255, and the model normalises them on its device.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tinyllava.config import VisionTowerSpec
from tinyllava.errors import UserError
from tinyllava.factory import check_trusted, load_code
from tinyllava.files import FAULTS, read_json, shorten_error
from tinyllava.find import is_hub_reachable, locate_part
from tinyllava.vision_towers import find_family, split_tower_name

logger = logging.getLogger("tinyllava")

KIND = "image processor"  # its name in messages
FILE = "preprocessor_config.json"
REMEDY = f"Give a {FILE}, its directory, or your own class as my_pkg.my_module:Name."
RAW = {"do_rescale": False, "do_normalize": False}  # for uint8 pixels, which the model normalises
KEEP_SIZE = {"do_resize": False, "do_center_crop": False, "do_pad": False}  # for a tile, which has its final size


def make_llava_image_processor(fields: dict, image_size: int, aspect: str = "processor") -> LlavaImageProcessorPil:
    """Llava's image processor with a tower's `fields`. It returns squares of `image_size` pixels a side.

    aspect: `processor` as the fields say, `square` squashes, `pad` pads to a square first, `crop` crops the centre.
    """
    square = {"height": image_size, "width": image_size}
    shapes = {
        "processor": {},
        "square": {"size": square, "do_center_crop": False, "do_pad": False},
        "pad": {"size": square, "do_center_crop": False, "do_pad": True},
        "crop": {"size": {"shortest_edge": image_size}, "do_center_crop": True, "do_pad": False},
    }
    # crop_size is always set: LlavaProcessor and vLLM count an image's tokens from it even where nothing is cropped.
    return LlavaImageProcessorPil(**{**fields, **shapes[aspect], "crop_size": square})


def is_code(name: str | None) -> bool:
    """Whether a recipe's image processor is the address of a class, not a file or directory."""
    return name is not None and ":" in name and not os.path.exists(os.path.expanduser(name))


def read_image_fields(name: str) -> dict[str, Any]:
    """The fields of a preprocessor_config.json under the names of Llava's image processor. Raises UserError."""
    path = Path(os.path.expanduser(name))
    path = path / FILE if os.path.isdir(path) else path
    try:
        fields = read_json(path)
    except UserError as error:
        raise UserError(f"image processor: {error} {REMEDY}") from None
    if not fields.get("do_rescale", True) or abs(fields.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise UserError(
            f"{path}: pixels are always rescaled by 1/255. Express other factors in image_mean and image_std."
        )
    if not fields.get("do_normalize", True):
        fields |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    standard = LlavaImageProcessorPil(**fields).to_dict()  # old files say `size: 224`
    return {key: standard[key] for key in fields if key in standard}


def load_own_class(address: str) -> type[BaseImageProcessor]:
    """The class at `package.module:Name`, registered with transformers' Auto classes. Raises UserError for others."""
    loaded = load_code(address, KIND)
    if not (isinstance(loaded, type) and issubclass(loaded, BaseImageProcessor)):
        raise UserError(
            f"image processor {address} is not a subclass of transformers' BaseImageProcessor (PilBackend)."
        )
    # The Auto class finds an image processor by a config class. The user's has none, so this one exists for its name.
    key = type(f"{loaded.__name__}Config", (PreTrainedConfig,), {"__module__": loaded.__module__})
    AutoImageProcessor.register(key, image_processor_classes={"pil": loaded}, exist_ok=True)
    return loaded


def load_trusted_class(address: str) -> type[BaseImageProcessor]:
    """`load_own_class` for an address in a checkpoint. Raises UserError unless the user allowed this code to run."""
    check_trusted(address, KIND)
    return load_own_class(address)


def load_own_image_processor(address: str) -> tuple[BaseImageProcessor, int]:
    """The user's image processor, and pixels a side of its images. Raises UserError if it breaks the contract."""
    processor = load_own_class(address)()
    noise = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    images = [Image.fromarray(noise), Image.fromarray(noise.transpose(1, 0, 2)[:, :60])]
    raw, normalised = ([np.asarray(view) for view in processor(images, **how)["pixel_values"]] for how in (RAW, {}))
    side = normalised[0].shape[-1]
    tile = processor([Image.new("RGB", (side, side))], **RAW, **KEEP_SIZE)["pixel_values"]
    shapes = {np.shape(view) for view in [*raw, *normalised, *tile]}
    if shapes != {(3, side, side)}:
        raise UserError(
            f"image processor {address} makes {shapes}: every image, and every tile, must become [3, S, S]."
        )
    mean, std = (np.broadcast_to(getattr(processor, name), 3) for name in ("image_mean", "image_std"))
    on_device = (np.stack(raw).astype(np.uint8) / 255 - mean[:, None, None]) / std[:, None, None]
    difference = np.abs(on_device - np.stack(normalised)).max()
    # One grey level and rounding. Written with `not`, because a NaN must also fail.
    if not difference <= 1.5 / 255 / std.min():
        raise UserError(
            f"image processor {address}: its pixels differ by {difference:.2g} from those without do_rescale"
            " and do_normalize, divided by 255 and normalised with its image_mean and image_std as the model does."
        )
    return processor, side


def load_image_processor(spec: VisionTowerSpec, config: PreTrainedConfig) -> tuple[BaseImageProcessor, int]:
    """The image processor of a vision tower (the user's, its own or its family's), and pixels a side of its images."""
    if is_code(spec.image_processor):
        return load_own_image_processor(spec.image_processor)
    fields: dict[str, Any] = {}
    if spec.image_processor is not None:
        fields = read_image_fields(spec.image_processor)
    elif spec.name is not None:
        name = locate_part("vision_tower", split_tower_name(spec.name)[0])
        where = {"local_files_only": not Path(name).is_dir() and not is_hub_reachable(), "trust_remote_code": False}
        try:
            fields = AutoImageProcessor.from_pretrained(name, backend="pil", **where).to_dict()
        except ImportError:  # DINOv3's class requires torchvision, but the fields in its file are enough
            fields = ImageProcessingMixin.get_image_processor_dict(name, **where)[0]
        except OSError:
            logger.info("%s has no image processor of its own: using the settings of its family", name)
        except FAULTS as error:
            raise UserError(f"cannot read the image processor of {name}: {shorten_error(error)}. {REMEDY}") from None
    fields, image_size = combine_image_fields(config, fields)
    return make_llava_image_processor(fields, image_size, spec.image_aspect), image_size


def combine_image_fields(config: PreTrainedConfig, fields: Mapping[str, Any]) -> tuple[dict, int]:
    """The image processor of the tower's family, overridden by `fields`, and pixels a side of its images."""
    names = ("size", "crop_size", "do_center_crop", "image_mean", "image_std", "resample")
    overrides = {name: fields[name] for name in names if fields.get(name) is not None}
    combined = find_family(config).image_processor(config) | overrides
    is_cropped = combined.get("do_center_crop") and combined.get("crop_size")
    side = (combined["crop_size"] if is_cropped else combined["size"]).get("height", config.image_size)
    return combined, side
