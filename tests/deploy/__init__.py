"""What runs only with root, servers or minutes: each module is a command of its own, none is a test of pytest."""
