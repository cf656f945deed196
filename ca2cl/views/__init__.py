"""The two views of a tile: recipes, drawing and rendering on the device."""
