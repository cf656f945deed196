"""Registered encoders: register, resolve, serve, and the runs that measured them."""
