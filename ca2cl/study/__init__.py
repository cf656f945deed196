"""Studies: recipes x seeds as jobs, and one table that compares them."""
