"""Public weights: timm's and the hub's names, files, their layouts and licences."""
