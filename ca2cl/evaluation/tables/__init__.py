"""Tables and figures beside the scores: calibration, recall by class."""
