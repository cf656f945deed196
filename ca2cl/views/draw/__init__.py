"""What views draw: random numbers by name, maps of coordinates, the table of a batch."""
