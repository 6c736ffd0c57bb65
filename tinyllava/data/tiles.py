"""Tiles (any resolution): the model sees a large image as a thumbnail, and again as tiles with more pixels.

    tiles = Tiles(limit=6, side=384)
    tiles.find_grid((1024, 768))               # (2, 3): two rows of three tiles
    count_image_tokens(729, [(2, 3), (1, 1)])  # [5105, 729] positions: seven views and a separator a row; one view

The views of an image are its thumbnail and then its tiles, row by row. Without tiles, the thumbnail is the only view.
The tokens of the image are those of its views in this order. A learned separator follows each row of tiles, like
LLaVA-NeXT's image_newline.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

Grid = tuple[int, int]  # rows and columns of tiles; (1, 1) is the thumbnail alone


@dataclass(frozen=True)
class Tiles:
    """How images are cut: into `limit` tiles at most, each of `side` x `side` pixels."""

    limit: int
    side: int

    def find_grid(self, size: tuple[int, int]) -> Grid:
        """The grid of an image of (width, height) pixels."""
        return find_best_grid(*size, self.side, self.limit)

    def cut(self, image: Image.Image, grid: Grid, resample: int = Image.Resampling.BICUBIC) -> list[Image.Image]:
        """The tiles of an image, row by row. It is first resized to fill the grid without padding. [] for (1, 1)."""
        rows, columns = grid
        if rows * columns == 1:
            return []
        whole, side = image.resize((columns * self.side, rows * self.side), resample), self.side
        corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
        return [whole.crop((left, top, left + side, top + side)) for left, top in corners]


@lru_cache(maxsize=4096)
def find_best_grid(width: int, height: int, side: int, limit: int) -> Grid:
    """The best grid of at most `limit` tiles for an image: highest `shown` x (`shown` / pixels of the grid).

    `shown` is the number of the image's pixels that fit into the grid with the aspect ratio kept: LLaVA-NeXT's
    effective resolution, at most width x height. The second factor, the filled share of the grid, prevents two faults:
    enlarging a small image (a grid of two tiles a side requires half its pixels, InternVL's threshold), and stretching
    a 21:20 image over 3 x 2 tiles. If grids are equal, the one with the fewest tiles is taken.
    """

    def rate(grid: Grid) -> float:
        rows, columns = grid
        pixels = rows * columns * side**2
        across, down = columns * height, rows * width  # equal where the grid has the image's aspect ratio
        shown = min(pixels * min(across, down) / max(across, down), width * height)
        return shown * shown / pixels

    grids = [(rows, columns) for rows in range(1, limit + 1) for columns in range(1, limit // rows + 1)]
    return max(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)), key=rate)


def count_views(grid: Grid) -> int:
    """The number of squares of an image that the tower sees: its thumbnail and its tiles."""
    tiles = grid[0] * grid[1]
    return 1 if tiles == 1 else 1 + tiles


def count_image_tokens(per_view: int, grids: Sequence[Grid]) -> list[int]:
    """Positions that each image takes in the LLM: `per_view` for each view, and one for each row of tiles."""
    return [per_view * count_views(grid) + (grid[0] if count_views(grid) > 1 else 0) for grid in grids]


def to_draft_size(side: int | None, grid: Grid) -> tuple[int, int] | None:
    """The useful width and height of an image with this grid, if `side` pixels are useful in each view.

    None without `side`: all pixels are useful.
    """
    rows, columns = grid
    return (side * columns, side * rows) if side else None


def order_tokens(per_view: int, grids: Sequence[Grid]) -> list[np.ndarray]:
    """For each image, the indices of its tokens among the tokens of all views and the separator.

    The tokens of the views come first, `per_view` for each view, and then the separator.
    """
    separator = per_view * sum(map(count_views, grids))
    at, orders = 0, []
    for grid in grids:
        rows, columns = grid if count_views(grid) > 1 else (0, 0)
        tiles = np.arange(at + per_view, at + per_view * count_views(grid)).reshape(rows, columns * per_view)
        ended = np.pad(tiles, ((0, 0), (0, 1)), constant_values=separator)  # a separator at the end of each row
        orders.append(np.concatenate([np.arange(at, at + per_view), ended.ravel()]))
        at += per_view * count_views(grid)
    return orders
