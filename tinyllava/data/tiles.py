"""Tiles (any-resolution): a picture with more pixels than the vision tower sees is shown whole, and again in parts.

    tiles = Tiles(limit=6, side=384)
    tiles.grid((1024, 768))              # (2, 3): two rows of three tiles
    image_tokens(729, [(2, 3), (1, 1)])  # [5105, 729] positions: seven views and a separator a row; one view

Its views are its thumbnail, which is the one view that it has without tiles, then its tiles row by row. Its tokens are
theirs in this order, with a learned separator after each row of tiles, as LLaVA-NeXT's image_newline ends its rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

Grid = tuple[int, int]  # rows and columns of tiles; (1, 1) is the thumbnail alone


@dataclass(frozen=True)
class Tiles:
    """How pictures are cut: into `limit` tiles at most, each of `side` x `side` pixels."""

    limit: int
    side: int

    def grid(self, size: tuple[int, int]) -> Grid:
        """The grid of a picture of (width, height) pixels."""
        return best_grid(*size, self.side, self.limit)

    def cut(self, image: Image.Image, grid: Grid, resample: int = Image.Resampling.BICUBIC) -> list[Image.Image]:
        """The picture's tiles row by row: resized to the grid's pixels, so that none is padding. [] for (1, 1)"""
        rows, columns = grid
        if rows * columns == 1:
            return []
        whole, side = image.resize((columns * self.side, rows * self.side), resample), self.side
        corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
        return [whole.crop((left, top, left + side, top + side)) for left, top in corners]


@lru_cache(maxsize=4096)
def best_grid(width: int, height: int, side: int, limit: int) -> Grid:
    """The grid that shows most of a picture's pixels for its tiles: highest `shown` x (`shown` / pixels of the grid).

    `shown` is what a grid has room for with the aspect ratio kept, but never more than there is: LLaVA-NeXT's effective
    resolution. The share of the grid that it fills keeps a small picture from being blown up (two tiles a side need
    half their pixels, InternVL's threshold) and a 21:20 one from being stretched over 3 x 2. Ties: the fewest tiles.
    """

    def worth(grid: Grid) -> float:
        rows, columns = grid
        pixels = rows * columns * side**2
        across, down = columns * height, rows * width  # equal where the grid has the picture's aspect ratio
        shown = min(pixels * min(across, down) / max(across, down), width * height)
        return shown * shown / pixels

    grids = [(rows, columns) for rows in range(1, limit + 1) for columns in range(1, limit // rows + 1)]
    return max(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)), key=worth)


def views(grid: Grid) -> int:
    """Squares that the tower sees of a picture: its thumbnail, and its tiles."""
    tiles = grid[0] * grid[1]
    return 1 if tiles == 1 else 1 + tiles


def image_tokens(each: int, grids: Sequence[Grid]) -> list[int]:
    """Positions that each picture takes: `each` for a view, and one for a row of tiles."""
    return [each * views(grid) + (grid[0] if views(grid) > 1 else 0) for grid in grids]


def draft_size(side: int | None, grid: Grid) -> tuple[int, int] | None:
    """Width and height that are of use of a picture, where `side` pixels are of use of each of its views."""
    rows, columns = grid
    return (side * columns, side * rows) if side else None


def token_order(each: int, grids: Sequence[Grid]) -> list[np.ndarray]:
    """For each picture, where its tokens lie among those of all views and the separator, [views * each + 1]."""
    separator = each * sum(map(views, grids))
    at, orders = 0, []
    for grid in grids:
        rows, columns = grid if views(grid) > 1 else (0, 0)
        tiles = np.arange(at + each, at + each * views(grid)).reshape(rows, columns * each)
        ended = np.pad(tiles, ((0, 0), (0, 1)), constant_values=separator)
        orders.append(np.concatenate([np.arange(at, at + each), ended.ravel()]))
        at += each * views(grid)
    return orders
