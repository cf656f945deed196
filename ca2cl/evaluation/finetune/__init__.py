"""``ca2cl finetune``: the encoder trained on labelled tiles, with early stopping."""
