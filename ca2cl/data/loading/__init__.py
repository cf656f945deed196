"""Sample order, stream and worker processes of training and evaluation."""
