"""What training pictures undergo: policies of Kornia ops, how pictures move, and which texts forbid which movements.

Below `data` and `vision`, which use the same movement: the one on the coordinates of a text, in worker processes before
it is tokenised, the other on the picture, on the device. No torch at import time.
"""
