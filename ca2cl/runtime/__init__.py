"""The processes of a job: launcher, ranks, device, precision and signals."""
