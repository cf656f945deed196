"""CA2CL: NT-Xent, cluster loss and adversarial stem weights (docs/mathematics.md)."""
