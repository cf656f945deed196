"""The two views of a tile: recipes, drawing and rendering."""
