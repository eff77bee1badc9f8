"""Detection: the only step that imports detectron2."""

from detection.compat import silence

silence()  # before detectron2 is imported, which warns of things that no one can act on
