"""Watch: the encoder measured on held-out tiles while it trains."""
