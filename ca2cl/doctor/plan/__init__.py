"""`ca2cl doctor --plan`: memory of each process of a planned job"""
