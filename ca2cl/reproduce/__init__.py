"""Published tables, cell by cell, beside ours."""
