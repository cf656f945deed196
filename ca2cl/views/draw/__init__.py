"""Random draws of a batch's views, in one table."""
