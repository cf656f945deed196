"""What training and evaluation read: sample order, stream and worker processes."""
