"""``ca2cl detect``: gland detectors on an encoder.

Only this package imports detectron2 and pycocotools.
"""
