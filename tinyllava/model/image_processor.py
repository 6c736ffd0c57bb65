"""Image processors: one for all towers, with a tower's fields or those of a file; or a class of the user's own.

`LlavaImageProcessor` (PIL backend) equals CLIP's, SigLIP's and DINOv2's own processors once its fields are set, so
that every checkpoint carries the same one, unless its recipe says otherwise:

    vision_tower: {name: ..., image_processor: my_processor/preprocessor_config.json}
    vision_tower: {name: ..., image_processor: my_pkg.my_module:MyImageProcessor}

A class is one of transformers' image processors (docs/images.md shows one): made without arguments, it turns pictures
into `pixel_values` [3, S, S] of one side S, normalised with its `image_mean` and `image_std`; with `do_rescale=False,
do_normalize=False` into 0..255 as the model normalises them on its device.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tinyllava.errors import UserError
from tinyllava.factory import check_trusted, load_code

WHAT = "image processor"
FILE = "preprocessor_config.json"
RAW = {"do_rescale": False, "do_normalize": False}
AS_IT_IS = {"do_resize": False, "do_center_crop": False, "do_pad": False}  # for a tile, which has its size already


def llava_image_processor(fields: dict, image_size: int, aspect: str = "processor") -> LlavaImageProcessorPil:
    """Llava's image processor with a tower's `fields`, giving squares of `image_size` pixels.

    aspect: `processor` as the tower's own; `square` squashes, `pad` pads to a square first, `crop` cuts the centre.
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
    """Whether a recipe's image processor is a class, and not a file or directory."""
    return name is not None and ":" in name and not Path(name).expanduser().exists()


def read_fields(name: str) -> dict[str, Any]:
    """What a preprocessor_config.json says, in the words of Llava's image processor. Raises UserError."""
    path = Path(name).expanduser()
    path = path / FILE if path.is_dir() else path
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"cannot read the image processor {path}: {getattr(error, 'strerror', None) or error}. Give a {FILE}, its"
            " directory, or your own class as my_pkg.my_module:Name."
        ) from None
    if not said.get("do_rescale", True) or abs(said.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise UserError(f"{path}: pixels are rescaled by 1/255 here. Put other factors into image_mean and image_std.")
    if not said.get("do_normalize", True):
        said |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    standard = LlavaImageProcessorPil(**said).to_dict()  # old files say `size: 224`
    return {key: standard[key] for key in said if key in standard}


def own_class(address: str) -> type[BaseImageProcessor]:
    """The class at `package.module:Name`, made known to transformers' Auto classes. Raises UserError if it is none."""
    found = load_code(address, WHAT)
    if not (isinstance(found, type) and issubclass(found, BaseImageProcessor)):
        raise UserError(f"image processor {address} is no subclass of transformers' BaseImageProcessor (PilBackend).")
    key = type(f"{found.__name__}Config", (PreTrainedConfig,), {"__module__": found.__module__})
    AutoImageProcessor.register(key, image_processor_classes={"pil": found}, exist_ok=True)
    return found


def trusted_class(address: str) -> type[BaseImageProcessor]:
    """`own_class` of an address that a checkpoint names. Raises UserError unless the user said that it may run."""
    check_trusted(address, WHAT)
    return own_class(address)


def own_image_processor(address: str) -> tuple[BaseImageProcessor, int]:
    """The user's image processor, and the side of what it makes. Raises UserError when it breaks the contract."""
    processor = own_class(address)()
    noise = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    pictures = [Image.fromarray(noise), Image.fromarray(noise.transpose(1, 0, 2)[:, :60])]
    raw, made = ([np.asarray(view) for view in processor(pictures, **how)["pixel_values"]] for how in (RAW, {}))
    side = made[0].shape[-1]
    tile = processor([Image.new("RGB", (side, side))], **RAW, **AS_IT_IS)["pixel_values"]
    shapes = {np.shape(view) for view in [*raw, *made, *tile]}
    if shapes != {(3, side, side)}:
        raise UserError(
            f"image processor {address} makes {shapes}: all pictures must become [3, S, S], and a tile of S stay so."
        )
    mean, std = (np.broadcast_to(getattr(processor, name), 3) for name in ("image_mean", "image_std"))
    on_device = (np.stack(raw).astype(np.uint8) / 255 - mean[:, None, None]) / std[:, None, None]
    difference = np.abs(on_device - np.stack(made)).max()
    if not difference <= 1.5 / 255 / std.min():  # a grey level and some rounding
        raise UserError(
            f"image processor {address}: its pixels differ by {difference:.2g} from those that it makes with do_rescale"
            " and do_normalize off, divided by 255 and normalised with its image_mean and image_std, as the model does."
        )
    return processor, side
