"""Parts become one model: build it from a recipe, save and load it in the layout the world reads."""
